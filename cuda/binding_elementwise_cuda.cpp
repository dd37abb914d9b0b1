// CUDA implementations of the operators that rwkv_train/ops/registration/elementwise.py declares.
#include "binding_cuda.h"

namespace {
using namespace rwkv::binding;

// Returns the pointers of the mixes.
std::vector<const float *> check_mixes(const Tensor &x, const std::optional<Tensor> &previous,
                                       const std::vector<Tensor> &mixes) {
  STD_TORCH_CHECK(x.dim() == 3 && x.numel() > 0, "rwkv_train: x must be (B, T, C) and not empty");
  STD_TORCH_CHECK(mixes.size() > 0 && mixes.size() <= 8, "rwkv_train: shift_mix takes 1 to 8 mixes");
  check(x, "x", sizes_of(x), x.scalar_type(), x);
  if (previous) check(*previous, "previous", {x.size(0), x.size(2)}, x.scalar_type(), x);
  std::vector<const float *> pointers;
  for (const Tensor &mix : mixes) {  // C elements in any shape: checkpoints have (1, 1, C)
    STD_TORCH_CHECK(mix.numel() == x.size(2), "rwkv_train: a mix has the wrong number of elements");
    check(mix, "a mix", sizes_of(mix), ScalarType::Float, x);
    pointers.push_back(in_floats(mix));
  }
  return pointers;
}

std::vector<Tensor> shift_mix(const Tensor &x, std::optional<Tensor> previous, std::vector<Tensor> mixes) {
  const std::vector<const float *> weights = check_mixes(x, previous, mixes);
  const OnDeviceOf device(x);
  std::vector<Tensor> outputs;
  std::vector<void *> pointers;
  for (size_t i = 0; i < mixes.size(); ++i) {
    outputs.push_back(new_like(x));
    pointers.push_back(out(outputs[i]));
  }
  check_launch(rwkv_shift_mix(storage(x), x.size(0), x.size(1), x.size(2), int64_t(mixes.size()), in(x),
                              previous ? in(*previous) : nullptr, weights.data(), pointers.data(), device.stream()));
  return outputs;
}

// Returns dx (B, T, C), dprevious (B, C) and the gradient of each mix in its shape.
std::tuple<Tensor, Tensor, std::vector<Tensor>> shift_mix_backward(const Tensor &x, std::optional<Tensor> previous,
                                                                   std::vector<Tensor> mixes,
                                                                   std::vector<Tensor> grads) {
  const std::vector<const float *> weights = check_mixes(x, previous, mixes);
  STD_TORCH_CHECK(grads.size() == mixes.size(), "rwkv_train: shift_mix needs one gradient per mix");
  const OnDeviceOf device(x);
  const int64_t B = x.size(0), T = x.size(1), C = x.size(2), count = int64_t(mixes.size());
  std::vector<const void *> gradients;
  std::vector<Tensor> dmixes;
  std::vector<float *> pointers;
  for (size_t i = 0; i < mixes.size(); ++i) {
    check(grads[i], "a gradient of shift_mix", sizes_of(x), x.scalar_type(), x);
    gradients.push_back(in(grads[i]));
    dmixes.push_back(new_like(mixes[i]));
    pointers.push_back(out_floats(dmixes[i]));
  }
  Tensor dx = new_like(x), dprevious = new_tensor(x, {B, C}, x.scalar_type()),
         scratch = new_tensor(x, {B * ((T + 63) / 64) * count * C}, ScalarType::Float);
  check_launch(rwkv_shift_mix_backward(storage(x), B, T, C, count, in(x), previous ? in(*previous) : nullptr,
                                       weights.data(), gradients.data(), out(dx), out(dprevious), pointers.data(),
                                       out_floats(scratch), device.stream()));
  return {dx, dprevious, dmixes};
}

Tensor relu_squared(const Tensor &k) {
  check(k, "k", sizes_of(k), k.scalar_type(), k);
  const OnDeviceOf device(k);
  Tensor h = new_like(k);
  check_launch(rwkv_relu_squared(storage(k), k.numel(), in(k), out(h), device.stream()));
  return h;
}

Tensor relu_squared_backward(const Tensor &h, const Tensor &gh) {
  check(h, "h", sizes_of(h), h.scalar_type(), h);
  check(gh, "the gradient of relu_squared", sizes_of(h), h.scalar_type(), h);
  const OnDeviceOf device(h);
  Tensor dk = new_like(h);
  check_launch(rwkv_relu_squared_backward(storage(h), h.numel(), in(h), in(gh), out(dk), device.stream()));
  return dk;
}

Tensor sigmoid_gate(const Tensor &r, const Tensor &y) {
  check(r, "r", sizes_of(r), r.scalar_type(), r), check(y, "y", sizes_of(r), r.scalar_type(), r);
  const OnDeviceOf device(r);
  Tensor o = new_like(r);
  check_launch(rwkv_sigmoid_gate(storage(r), r.numel(), in(r), in(y), out(o), device.stream()));
  return o;
}

std::tuple<Tensor, Tensor> sigmoid_gate_backward(const Tensor &r, const Tensor &y, const Tensor &go) {
  check(r, "r", sizes_of(r), r.scalar_type(), r), check(y, "y", sizes_of(r), r.scalar_type(), r);
  check(go, "the gradient of sigmoid_gate", sizes_of(r), r.scalar_type(), r);
  const OnDeviceOf device(r);
  Tensor dr = new_like(r), dy = new_like(r);
  check_launch(
      rwkv_sigmoid_gate_backward(storage(r), r.numel(), in(r), in(y), in(go), out(dr), out(dy), device.stream()));
  return {dr, dy};
}
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rwkv_train, CUDA, m) {
  m.impl("shift_mix_one_document", TORCH_BOX(&shift_mix));
  m.impl("shift_mix_one_document_backward", TORCH_BOX(&shift_mix_backward));
  m.impl("relu_squared", TORCH_BOX(&relu_squared));
  m.impl("relu_squared_backward", TORCH_BOX(&relu_squared_backward));
  m.impl("sigmoid_gate", TORCH_BOX(&sigmoid_gate));
  m.impl("sigmoid_gate_backward", TORCH_BOX(&sigmoid_gate_backward));
}
