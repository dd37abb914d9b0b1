// Registers the CPU kernels as implementations of the operators that rwkv_train/ops/library.py declares.
//
// It uses torch's stable ABI, so no ATen header is parsed: it compiles in seconds. Threads are torch's own, by its
// parallel_for, so torch.set_num_threads is obeyed. Checks here guard memory only; rwkv_train.ops explains mistakes.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <memory>
#include <numeric>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu.h"

namespace {
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Sizes = std::vector<int64_t>;

constexpr int64_t LEAST_WORK = 16384;  // elements that are worth waking a thread for

void check(const Tensor &x, const char *name, const Sizes &sizes, ScalarType dtype) {
  STD_TORCH_CHECK(x.scalar_type() == dtype, "rwkv_train: ", name, " has the wrong dtype");
  STD_TORCH_CHECK(x.is_contiguous(), "rwkv_train: ", name, " must be contiguous");
  bool same = x.dim() == int64_t(sizes.size());
  for (size_t i = 0; same && i < sizes.size(); ++i) same = x.size(int64_t(i)) == sizes[i];
  STD_TORCH_CHECK(same, "rwkv_train: ", name, " has the wrong shape");
}

Sizes sizes_of(const Tensor &x) {
  Sizes sizes(size_t(x.dim()));
  for (int64_t i = 0; i < x.dim(); ++i) sizes[size_t(i)] = x.size(i);
  return sizes;
}

Tensor empty(const Tensor &like, const Sizes &sizes, ScalarType dtype) {
  return torch::stable::new_empty(like, sizes, dtype);
}

template <class S> const S *in(const Tensor &x) { return static_cast<const S *>(x.const_data_ptr()); }
template <class S> S *out(Tensor &x) { return static_cast<S *>(x.mutable_data_ptr()); }

// Calls body with a value of the storage type that belongs to x's dtype.
template <class Body> void with_storage(const Tensor &x, const Body &body) {
  if (x.scalar_type() == ScalarType::Float)
    body(float());
  else if (x.scalar_type() == ScalarType::BFloat16)
    body(rwkv::bf16());
  else
    STD_TORCH_CHECK(false, "rwkv_train: the C++ engine computes in float32 and bfloat16");
}

template <class Body> void over_tasks(int64_t tasks, int64_t elements, const Body &body) {
  const int64_t grain = std::max<int64_t>(1, LEAST_WORK * tasks / std::max<int64_t>(elements, 1));
  torch::stable::parallel_for(0, tasks, grain, body);
}

rwkv::Wkv4Shape wkv4_shape(const Tensor &k, int64_t chunk) {
  rwkv::Wkv4Shape s{k.size(0), k.size(1), k.size(2), chunk, k.size(2)};
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t ranges = threads / std::gcd(s.B, threads);  // so that tasks are a multiple of the threads
  s.width = std::max<int64_t>(32, ((s.C + ranges - 1) / ranges + 15) / 16 * 16);
  return s;
}

void check_wkv4(const Tensor &w, const Tensor &u, const Tensor &k, const Tensor &v, const Tensor &state, int64_t chunk) {
  STD_TORCH_CHECK(k.dim() == 3 && k.size(1) > 0 && chunk > 0, "rwkv_train: k must be (B, T, C) with T and chunk above 0");
  const int64_t B = k.size(0), C = k.size(2);
  check(w, "w", {C}, ScalarType::Float), check(u, "u", {C}, ScalarType::Float);
  check(k, "k", sizes_of(k), k.scalar_type()), check(v, "v", sizes_of(k), k.scalar_type());
  check(state, "state", {B, 3, C}, ScalarType::Float);
}

// Where documents begin, (B, T); null where the operator takes none.
const bool *starts_of(const Tensor *starts, const Tensor &x) {
  if (!starts) return nullptr;
  check(*starts, "starts", {x.size(0), x.size(1)}, ScalarType::Bool);
  return in<bool>(*starts);
}

std::tuple<Tensor, Tensor, Tensor> wkv4_over(const Tensor &w, const Tensor &u, const Tensor &k, const Tensor &v,
                                             const Tensor &state, const Tensor *starts, int64_t chunk) {
  check_wkv4(w, u, k, v, state, chunk);
  const rwkv::Wkv4Shape s = wkv4_shape(k, chunk);
  Tensor y = empty(k, sizes_of(k), k.scalar_type()), new_state = empty(state, {s.B, 3, s.C}, ScalarType::Float),
         saved = empty(state, {s.B, s.saved(), 3, s.C}, ScalarType::Float);
  with_storage(k, [&](auto storage) {
    using S = decltype(storage);
    const rwkv::Wkv4Forward<S> a{in<float>(w),     in<float>(u), in<S>(k),              in<S>(v),
                                 in<float>(state), out<S>(y),    out<float>(new_state), out<float>(saved),
                                 starts_of(starts, k)};
    over_tasks(s.tasks(), s.B * s.T * s.C, [&](int64_t begin, int64_t end) { rwkv::wkv4_forward(s, a, begin, end); });
  });
  return {y, new_state, saved};
}

std::tuple<Tensor, Tensor, Tensor> wkv4(const Tensor &w, const Tensor &u, const Tensor &k, const Tensor &v,
                                        const Tensor &state, int64_t chunk) {
  return wkv4_over(w, u, k, v, state, nullptr, chunk);
}

std::tuple<Tensor, Tensor, Tensor> wkv4_documents(const Tensor &w, const Tensor &u, const Tensor &k, const Tensor &v,
                                                  const Tensor &state, const Tensor &starts, int64_t chunk) {
  return wkv4_over(w, u, k, v, state, &starts, chunk);
}

using Wkv4Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Wkv4Gradients wkv4_backward_over(const Tensor &w, const Tensor &u, const Tensor &k, const Tensor &v, const Tensor &state,
                                 const Tensor *starts, const Tensor &saved, const Tensor &gy,
                                 const std::optional<Tensor> &gstate, int64_t chunk) {
  check_wkv4(w, u, k, v, state, chunk);
  const rwkv::Wkv4Shape s = wkv4_shape(k, chunk);
  check(saved, "saved", {s.B, s.saved(), 3, s.C}, ScalarType::Float);
  check(gy, "the gradient of y", sizes_of(k), k.scalar_type());
  if (gstate) check(*gstate, "the gradient of the state", {s.B, 3, s.C}, ScalarType::Float);
  Tensor dk = empty(k, sizes_of(k), k.scalar_type()), dv = empty(k, sizes_of(k), k.scalar_type()),
         dw = empty(w, {s.C}, ScalarType::Float), du = empty(w, {s.C}, ScalarType::Float),
         dstate = empty(state, {s.B, 3, s.C}, ScalarType::Float), parts = empty(w, {2, s.B, s.C}, ScalarType::Float);
  float *dw_parts = out<float>(parts), *du_parts = dw_parts + s.B * s.C;
  with_storage(k, [&](auto storage) {
    using S = decltype(storage);
    const rwkv::Wkv4Backward<S> a{in<float>(w),     in<float>(u),
                                  in<S>(k),         in<S>(v),
                                  in<float>(state), in<float>(saved),
                                  in<S>(gy),        gstate ? in<float>(*gstate) : nullptr,
                                  out<S>(dk),       out<S>(dv),
                                  dw_parts,         du_parts,
                                  out<float>(dstate), starts_of(starts, k)};
    over_tasks(s.tasks(), s.B * s.T * s.C, [&](int64_t begin, int64_t end) {
      const std::unique_ptr<float[]> scratch(new float[size_t(rwkv::wkv4_scratch(s))]);
      rwkv::wkv4_backward(s, a, scratch.get(), begin, end);
    });
  });
  rwkv::sum_rows(dw_parts, out<float>(dw), s.B, s.C, s.C);
  rwkv::sum_rows(du_parts, out<float>(du), s.B, s.C, s.C);
  return {dw, du, dk, dv, dstate};
}

Wkv4Gradients wkv4_backward(const Tensor &w, const Tensor &u, const Tensor &k, const Tensor &v, const Tensor &state,
                            const Tensor &saved, const Tensor &gy, std::optional<Tensor> gstate, int64_t chunk) {
  return wkv4_backward_over(w, u, k, v, state, nullptr, saved, gy, gstate, chunk);
}

Wkv4Gradients wkv4_documents_backward(const Tensor &w, const Tensor &u, const Tensor &k, const Tensor &v,
                                      const Tensor &state, const Tensor &starts, const Tensor &saved, const Tensor &gy,
                                      std::optional<Tensor> gstate, int64_t chunk) {
  return wkv4_backward_over(w, u, k, v, state, &starts, saved, gy, gstate, chunk);
}

template <class S>
rwkv::ShiftMix<S> shift_mix_inputs(const Tensor &x, const std::optional<Tensor> &previous, const std::vector<Tensor> &mixes,
                                   const Tensor *starts) {
  const int64_t B = x.size(0), T = x.size(1), C = x.size(2), count = int64_t(mixes.size());
  STD_TORCH_CHECK(count > 0 && count <= rwkv::MOST_MIXES, "rwkv_train: shift_mix takes 1 to 8 mixes");
  check(x, "x", {B, T, C}, x.scalar_type());
  if (previous) check(*previous, "previous", {B, C}, x.scalar_type());
  rwkv::ShiftMix<S> a{};
  a.B = B, a.T = T, a.C = C, a.count = count, a.x = in<S>(x), a.previous = previous ? in<S>(*previous) : nullptr;
  a.starts = starts_of(starts, x);
  for (size_t i = 0; i < mixes.size(); ++i) {  // C elements in whatever shape: the checkpoints have (1, 1, C)
    STD_TORCH_CHECK(mixes[i].numel() == C, "rwkv_train: a mix has the wrong number of elements");
    check(mixes[i], "a mix", sizes_of(mixes[i]), ScalarType::Float);
    a.mix[i] = in<float>(mixes[i]);
  }
  return a;
}

std::vector<Tensor> shift_mix_over(const Tensor &x, const std::optional<Tensor> &previous, const std::vector<Tensor> &mixes,
                                   const Tensor *starts) {
  std::vector<Tensor> outputs;
  with_storage(x, [&](auto storage) {
    using S = decltype(storage);
    rwkv::ShiftMix<S> a = shift_mix_inputs<S>(x, previous, mixes, starts);
    for (size_t i = 0; i < mixes.size(); ++i) {
      outputs.push_back(empty(x, sizes_of(x), x.scalar_type()));
      a.out[i] = out<S>(outputs[i]);
    }
    over_tasks(a.tasks(), a.B * a.T * a.C, [&](int64_t begin, int64_t end) { rwkv::shift_mix_forward(a, begin, end); });
  });
  return outputs;
}

std::vector<Tensor> shift_mix(const Tensor &x, std::optional<Tensor> previous, std::vector<Tensor> mixes) {
  return shift_mix_over(x, previous, mixes, nullptr);
}

std::vector<Tensor> shift_mix_documents(const Tensor &x, std::optional<Tensor> previous, std::vector<Tensor> mixes,
                                        const Tensor &starts) {
  return shift_mix_over(x, previous, mixes, &starts);
}

using ShiftMixGradients = std::tuple<Tensor, Tensor, std::vector<Tensor>>;

// Returns dx (B, T, C), dprevious (B, C) and the gradient of each mix in its shape.
ShiftMixGradients shift_mix_backward_over(const Tensor &x, const std::optional<Tensor> &previous,
                                          const std::vector<Tensor> &mixes, const Tensor *starts,
                                          const std::vector<Tensor> &grads) {
  Tensor dx = empty(x, sizes_of(x), x.scalar_type()), dprevious = empty(x, {x.size(0), x.size(2)}, x.scalar_type());
  std::vector<Tensor> dmixes;
  with_storage(x, [&](auto storage) {
    using S = decltype(storage);
    rwkv::ShiftMix<S> a = shift_mix_inputs<S>(x, previous, mixes, starts);
    STD_TORCH_CHECK(grads.size() == mixes.size(), "rwkv_train: shift_mix needs one gradient per mix");
    for (size_t i = 0; i < grads.size(); ++i) {
      check(grads[i], "a gradient of shift_mix", sizes_of(x), x.scalar_type());
      a.grad[i] = in<S>(grads[i]);
    }
    Tensor parts = empty(x, {a.tasks(), a.count, a.C}, ScalarType::Float);
    a.dx = out<S>(dx), a.dprevious = out<S>(dprevious), a.dmix = out<float>(parts);
    over_tasks(a.tasks(), a.B * a.T * a.C, [&](int64_t begin, int64_t end) {
      const std::unique_ptr<float[]> carry(new float[size_t(a.C)]);
      rwkv::shift_mix_backward(a, carry.get(), begin, end);
    });
    for (int64_t i = 0; i < a.count; ++i) {
      dmixes.push_back(empty(x, sizes_of(mixes[size_t(i)]), ScalarType::Float));
      rwkv::sum_rows(out<float>(parts) + i * a.C, out<float>(dmixes[size_t(i)]), a.tasks(), a.C, a.count * a.C);
    }
  });
  return {dx, dprevious, dmixes};
}

ShiftMixGradients shift_mix_backward(const Tensor &x, std::optional<Tensor> previous, std::vector<Tensor> mixes,
                                     std::vector<Tensor> grads) {
  return shift_mix_backward_over(x, previous, mixes, nullptr, grads);
}

ShiftMixGradients shift_mix_documents_backward(const Tensor &x, std::optional<Tensor> previous, std::vector<Tensor> mixes,
                                               const Tensor &starts, std::vector<Tensor> grads) {
  return shift_mix_backward_over(x, previous, mixes, &starts, grads);
}

Tensor relu_squared(const Tensor &k) {
  check(k, "k", sizes_of(k), k.scalar_type());
  Tensor h = empty(k, sizes_of(k), k.scalar_type());
  with_storage(k, [&](auto storage) {
    using S = decltype(storage);
    over_tasks(k.numel(), k.numel(), [&](int64_t begin, int64_t end) {
      rwkv::relu_squared_forward(in<S>(k), out<S>(h), begin, end);
    });
  });
  return h;
}

Tensor relu_squared_backward(const Tensor &h, const Tensor &gh) {
  check(h, "h", sizes_of(h), h.scalar_type()), check(gh, "the gradient of relu_squared", sizes_of(h), h.scalar_type());
  Tensor dk = empty(h, sizes_of(h), h.scalar_type());
  with_storage(h, [&](auto storage) {
    using S = decltype(storage);
    over_tasks(h.numel(), h.numel(), [&](int64_t begin, int64_t end) {
      rwkv::relu_squared_backward(in<S>(h), in<S>(gh), out<S>(dk), begin, end);
    });
  });
  return dk;
}

Tensor sigmoid_gate(const Tensor &r, const Tensor &y) {
  check(r, "r", sizes_of(r), r.scalar_type()), check(y, "y", sizes_of(r), r.scalar_type());
  Tensor o = empty(r, sizes_of(r), r.scalar_type());
  with_storage(r, [&](auto storage) {
    using S = decltype(storage);
    over_tasks(r.numel(), r.numel(), [&](int64_t begin, int64_t end) {
      rwkv::sigmoid_gate_forward(in<S>(r), in<S>(y), out<S>(o), begin, end);
    });
  });
  return o;
}

std::tuple<Tensor, Tensor> sigmoid_gate_backward(const Tensor &r, const Tensor &y, const Tensor &go) {
  check(r, "r", sizes_of(r), r.scalar_type()), check(y, "y", sizes_of(r), r.scalar_type());
  check(go, "the gradient of sigmoid_gate", sizes_of(r), r.scalar_type());
  Tensor dr = empty(r, sizes_of(r), r.scalar_type()), dy = empty(r, sizes_of(r), r.scalar_type());
  with_storage(r, [&](auto storage) {
    using S = decltype(storage);
    over_tasks(r.numel(), r.numel(), [&](int64_t begin, int64_t end) {
      rwkv::sigmoid_gate_backward(in<S>(r), in<S>(y), in<S>(go), out<S>(dr), out<S>(dy), begin, end);
    });
  });
  return {dr, dy};
}
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rwkv_train, CPU, m) {
  m.impl("wkv4", TORCH_BOX(&wkv4));
  m.impl("wkv4_backward", TORCH_BOX(&wkv4_backward));
  m.impl("wkv4_documents", TORCH_BOX(&wkv4_documents));
  m.impl("wkv4_documents_backward", TORCH_BOX(&wkv4_documents_backward));
  m.impl("shift_mix", TORCH_BOX(&shift_mix));
  m.impl("shift_mix_backward", TORCH_BOX(&shift_mix_backward));
  m.impl("shift_mix_documents", TORCH_BOX(&shift_mix_documents));
  m.impl("shift_mix_documents_backward", TORCH_BOX(&shift_mix_documents_backward));
  m.impl("relu_squared", TORCH_BOX(&relu_squared));
  m.impl("relu_squared_backward", TORCH_BOX(&relu_squared_backward));
  m.impl("sigmoid_gate", TORCH_BOX(&sigmoid_gate));
  m.impl("sigmoid_gate_backward", TORCH_BOX(&sigmoid_gate_backward));
}
