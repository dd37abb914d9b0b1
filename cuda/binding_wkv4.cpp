// CPU implementations of the operators that rwkv_train/ops/registration/wkv4.py declares.
#include <memory>
#include <numeric>

#include "binding_cpu.h"
#include "wkv4_cpu.h"

namespace {
using namespace rwkv::binding;

rwkv::Wkv4Shape shape_of(const Tensor &k, int64_t chunk) {
  rwkv::Wkv4Shape s{k.size(0), k.size(1), k.size(2), chunk, k.size(2)};
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t ranges = threads / std::gcd(s.B, threads);  // so that tasks are a multiple of the threads
  s.width = std::max<int64_t>(32, ((s.C + ranges - 1) / ranges + 15) / 16 * 16);
  return s;
}

void check_inputs(const Tensor &w, const Tensor &u, const Tensor &k, const Tensor &v, const Tensor &state, int64_t chunk) {
  STD_TORCH_CHECK(k.dim() == 3 && k.size(1) > 0 && chunk > 0, "rwkv_train: k must be (B, T, C) with T and chunk above 0");
  const int64_t B = k.size(0), C = k.size(2);
  check(w, "w", {C}, ScalarType::Float), check(u, "u", {C}, ScalarType::Float);
  check(k, "k", sizes_of(k), k.scalar_type()), check(v, "v", sizes_of(k), k.scalar_type());
  check(state, "state", {B, 3, C}, ScalarType::Float);
}

// Returns y (B, T, C), the new state (B, 3, C) and the saved states (B, (T - 1) / chunk, 3, C).
std::tuple<Tensor, Tensor, Tensor> wkv4(const Tensor &w, const Tensor &u, const Tensor &k, const Tensor &v,
                                        const Tensor &state, std::optional<Tensor> starts, int64_t chunk) {
  check_inputs(w, u, k, v, state, chunk);
  const rwkv::Wkv4Shape s = shape_of(k, chunk);
  Tensor y = new_like(k), new_state = new_like(state),
         saved = new_tensor(state, {s.B, s.saved(), 3, s.C}, ScalarType::Float);
  with_storage(k, [&](auto storage) {
    using S = decltype(storage);
    const rwkv::Wkv4Forward<S> a{in<float>(w),     in<float>(u), in<S>(k),              in<S>(v),
                                 in<float>(state), out<S>(y),    out<float>(new_state), out<float>(saved),
                                 starts_or_null(starts, k)};
    over_tasks(s.tasks(), s.B * s.T * s.C, [&](int64_t begin, int64_t end) { rwkv::wkv4_forward(s, a, begin, end); });
  });
  return {y, new_state, saved};
}

// Returns the gradients of w, u, k, v and state.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> wkv4_backward(const Tensor &w, const Tensor &u, const Tensor &k,
                                                                 const Tensor &v, const Tensor &state,
                                                                 std::optional<Tensor> starts, const Tensor &saved,
                                                                 const Tensor &gy, std::optional<Tensor> gstate,
                                                                 int64_t chunk) {
  check_inputs(w, u, k, v, state, chunk);
  const rwkv::Wkv4Shape s = shape_of(k, chunk);
  check(saved, "saved", {s.B, s.saved(), 3, s.C}, ScalarType::Float);
  check(gy, "the gradient of y", sizes_of(k), k.scalar_type());
  if (gstate) check(*gstate, "the gradient of the state", {s.B, 3, s.C}, ScalarType::Float);
  Tensor dk = new_like(k), dv = new_like(k), dw = new_like(w), du = new_like(w), dstate = new_like(state),
         sequence_sums = new_tensor(w, {2, s.B, s.C}, ScalarType::Float);  // of dw and du, for each sequence
  float *dw_sums = out<float>(sequence_sums), *du_sums = dw_sums + s.B * s.C;
  with_storage(k, [&](auto storage) {
    using S = decltype(storage);
    const rwkv::Wkv4Backward<S> a{in<float>(w),       in<float>(u),
                                  in<S>(k),           in<S>(v),
                                  in<float>(state),   in<float>(saved),
                                  in<S>(gy),          gstate ? in<float>(*gstate) : nullptr,
                                  out<S>(dk),         out<S>(dv),
                                  dw_sums,            du_sums,
                                  out<float>(dstate), starts_or_null(starts, k)};
    over_tasks(s.tasks(), s.B * s.T * s.C, [&](int64_t begin, int64_t end) {
      const std::unique_ptr<float[]> scratch(new float[size_t(rwkv::wkv4_scratch(s))]);
      rwkv::wkv4_backward(s, a, scratch.get(), begin, end);
    });
  });
  rwkv::sum_rows(dw_sums, out<float>(dw), s.B, s.C, s.C);
  rwkv::sum_rows(du_sums, out<float>(du), s.B, s.C, s.C);
  return {dw, du, dk, dv, dstate};
}
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rwkv_train, CPU, m) {
  m.impl("wkv4", TORCH_BOX(&wkv4));
  m.impl("wkv4_backward", TORCH_BOX(&wkv4_backward));
}
