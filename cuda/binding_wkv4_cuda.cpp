// CUDA implementations of the operators that rwkv_train/ops/registration/wkv4.py declares.
#include "binding_cuda.h"

namespace {
using namespace rwkv::binding;

void check_inputs(const Tensor &w, const Tensor &u, const Tensor &k, const Tensor &v, const Tensor &state) {
  STD_TORCH_CHECK(k.dim() == 3 && k.numel() > 0, "rwkv_train: k must be (B, T, C) and not empty");
  const int64_t B = k.size(0), C = k.size(2);
  check(w, "w", {C}, ScalarType::Float, k), check(u, "u", {C}, ScalarType::Float, k);
  check(k, "k", sizes_of(k), k.scalar_type(), k), check(v, "v", sizes_of(k), k.scalar_type(), k);
  check(state, "state", {B, 3, C}, ScalarType::Float, k);
}

Sizes saved_sizes(const Tensor &k) { return {k.size(0), (k.size(1) - 1) / RWKV_CHUNK, 3, k.size(2)}; }

// Returns y (B, T, C), the new state (B, 3, C) and the saved states (B, (T - 1) / RWKV_CHUNK, 3, C).
std::tuple<Tensor, Tensor, Tensor> wkv4(const Tensor &w, const Tensor &u, const Tensor &k, const Tensor &v,
                                        const Tensor &state, int64_t segments) {
  check_inputs(w, u, k, v, state);
  const OnDeviceOf device(k);
  const int64_t B = k.size(0), T = k.size(1), C = k.size(2), scratch_rows = segments > 1 ? 6 * B * segments : 0;
  Tensor y = new_like(k), new_state = new_like(state), saved = new_tensor(state, saved_sizes(k), ScalarType::Float),
         scratch = new_tensor(state, {scratch_rows * C}, ScalarType::Float);
  check_launch(rwkv_wkv4_forward(storage(k), B, T, C, segments, in_floats(w), in_floats(u), in(k), in(v),
                                 in_floats(state), out(y), out_floats(new_state), out_floats(saved),
                                 out_floats(scratch), device.stream()));
  return {y, new_state, saved};
}

// Returns the gradients of w, u, k, v and state.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> wkv4_backward(const Tensor &w, const Tensor &u, const Tensor &k,
                                                                 const Tensor &v, const Tensor &state,
                                                                 const Tensor &saved, const Tensor &gy,
                                                                 std::optional<Tensor> gstate, int64_t segments) {
  check_inputs(w, u, k, v, state);
  check(saved, "saved", saved_sizes(k), ScalarType::Float, k);
  check(gy, "the gradient of y", sizes_of(k), k.scalar_type(), k);
  if (gstate) check(*gstate, "the gradient of the state", sizes_of(state), ScalarType::Float, k);
  const OnDeviceOf device(k);
  const int64_t B = k.size(0), T = k.size(1), C = k.size(2), scratch_rows = segments > 1 ? 10 * B * segments : 2 * B;
  Tensor dk = new_like(k), dv = new_like(k), dw = new_like(w), du = new_like(u), dstate = new_like(state),
         scratch = new_tensor(state, {scratch_rows * C}, ScalarType::Float);
  check_launch(rwkv_wkv4_backward(storage(k), B, T, C, segments, in_floats(w), in_floats(u), in(k), in(v),
                                  in_floats(state), in_floats(saved), in(gy), gstate ? in_floats(*gstate) : nullptr,
                                  out(dk), out(dv), out_floats(dw), out_floats(du), out_floats(dstate),
                                  out_floats(scratch), device.stream()));
  return {dw, du, dk, dv, dstate};
}
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rwkv_train, CUDA, m) {
  m.impl("wkv4_in_segments", TORCH_BOX(&wkv4));
  m.impl("wkv4_in_segments_backward", TORCH_BOX(&wkv4_backward));
}
