// CPU implementations of the operators that rwkv_train/ops/registration/wkv7.py declares.
#include <memory>
#include <numeric>

#include "binding_cpu.h"
#include "wkv7_cpu.h"

namespace {
using namespace rwkv::binding;

rwkv::Wkv7Shape shape_of(const Tensor &r, int64_t chunk) {
  STD_TORCH_CHECK(r.dim() == 4 && r.size(1) > 0 && chunk > 0, "rwkv_train: r must be (B, T, H, N) with T and chunk above 0");
  rwkv::Wkv7Shape s{r.size(0), r.size(1), r.size(2), r.size(3), chunk, r.size(3)};
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t ranges = threads / std::gcd(s.heads(), threads);  // so that tasks are a multiple of the threads
  const int64_t blocks = (s.N + rwkv::WKV7_ROWS - 1) / rwkv::WKV7_ROWS;
  s.rows = (blocks + ranges - 1) / ranges * rwkv::WKV7_ROWS;
  return s;
}

template <class S>
rwkv::Wkv7Inputs<S> inputs(const Tensor &r, const Tensor &w, const Tensor &k, const Tensor &v, const Tensor &a,
                           const Tensor &b, const Tensor &state, const std::optional<Tensor> &starts) {
  const Sizes sizes = sizes_of(r);
  const ScalarType storage = r.scalar_type();
  check(r, "r", sizes, storage), check(k, "k", sizes, storage), check(v, "v", sizes, storage);
  check(a, "a", sizes, storage), check(b, "b", sizes, storage), check(w, "w", sizes, ScalarType::Float);
  check(state, "state", {sizes[0], sizes[2], sizes[3], sizes[3]}, ScalarType::Float);
  return {in<S>(r), in<float>(w), in<S>(k), in<S>(v), in<S>(a), in<S>(b), in<float>(state), starts_or_null(starts, r)};
}

// An element of the state costs about a sixteenth of one of an element-wise operator.
int64_t work(const rwkv::Wkv7Shape &s) { return s.heads() * s.T * s.N * s.N / 16; }

// Returns y (B, T, H, N), the new state (B, H, N, N) and the saved states (B, (T - 1) / chunk, H, N, N).
std::tuple<Tensor, Tensor, Tensor> wkv7(const Tensor &r, const Tensor &w, const Tensor &k, const Tensor &v,
                                        const Tensor &a, const Tensor &b, const Tensor &state,
                                        std::optional<Tensor> starts, int64_t chunk) {
  const rwkv::Wkv7Shape s = shape_of(r, chunk);
  Tensor y = new_like(r), new_state = new_like(state),
         saved = new_tensor(state, {s.B, s.saved(), s.H, s.N, s.N}, ScalarType::Float);
  with_storage(r, [&](auto storage) {
    using S = decltype(storage);
    const rwkv::Wkv7Forward<S> p{inputs<S>(r, w, k, v, a, b, state, starts), out<S>(y), out<float>(new_state),
                                 out<float>(saved)};
    over_tasks(s.heads() * s.ranges(), work(s), [&](int64_t begin, int64_t end) {
      const std::unique_ptr<float[]> scratch(new float[size_t(rwkv::wkv7_forward_scratch(s))]);
      rwkv::wkv7_forward(s, p, scratch.get(), begin, end);
    });
  });
  return {y, new_state, saved};
}

// Returns the gradients of r, w, k, v, a, b and state.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> wkv7_backward(
    const Tensor &r, const Tensor &w, const Tensor &k, const Tensor &v, const Tensor &a, const Tensor &b,
    const Tensor &state, std::optional<Tensor> starts, const Tensor &saved, const Tensor &gy,
    std::optional<Tensor> gstate, int64_t chunk) {
  const rwkv::Wkv7Shape s = shape_of(r, chunk);
  check(saved, "saved", {s.B, s.saved(), s.H, s.N, s.N}, ScalarType::Float);
  check(gy, "the gradient of y", sizes_of(r), r.scalar_type());
  if (gstate) check(*gstate, "the gradient of the state", {s.B, s.H, s.N, s.N}, ScalarType::Float);
  Tensor dr = new_like(r), dw = new_like(w), dk = new_like(k), dv = new_like(v), da = new_like(a), db = new_like(b),
         dstate = new_like(state);
  with_storage(r, [&](auto storage) {
    using S = decltype(storage);
    const rwkv::Wkv7Backward<S> p{inputs<S>(r, w, k, v, a, b, state, starts), in<float>(saved), in<S>(gy),
                                  gstate ? in<float>(*gstate) : nullptr, out<S>(dr), out<float>(dw), out<S>(dk),
                                  out<S>(dv), out<S>(da), out<S>(db), out<float>(dstate)};
    over_tasks(s.heads(), work(s), [&](int64_t begin, int64_t end) {
      const std::unique_ptr<float[]> scratch(new float[size_t(rwkv::wkv7_backward_scratch(s))]);
      rwkv::wkv7_backward(s, p, scratch.get(), begin, end);
    });
  });
  return {dr, dw, dk, dv, da, db, dstate};
}
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rwkv_train, CPU, m) {
  m.impl("wkv7", TORCH_BOX(&wkv7));
  m.impl("wkv7_backward", TORCH_BOX(&wkv7_backward));
}
