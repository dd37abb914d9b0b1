// Registers the CUDA kernels as implementations of the operators that rwkv_train/ops/library.py declares.
//
// torch's stable ABI, as in binding.cpp, and no CUDA header: g++ compiles it. Memory comes from torch's caching
// allocator, launches go to its current stream on the tensors' card, and nothing waits: graphs can capture it.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <vector>

#include "kernels.h"

namespace {
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Sizes = std::vector<int64_t>;

Sizes sizes_of(const Tensor &x) {
  Sizes sizes(size_t(x.dim()));
  for (int64_t i = 0; i < x.dim(); ++i) sizes[size_t(i)] = x.size(i);
  return sizes;
}

void check(const Tensor &x, const char *name, const Sizes &sizes, ScalarType dtype, const Tensor &beside) {
  STD_TORCH_CHECK(x.is_cuda() && x.get_device_index() == beside.get_device_index(), "rwkv_train: ", name,
                  " is on another device");
  STD_TORCH_CHECK(x.scalar_type() == dtype, "rwkv_train: ", name, " has the wrong dtype");
  STD_TORCH_CHECK(x.is_contiguous(), "rwkv_train: ", name, " must be contiguous");
  STD_TORCH_CHECK(sizes_of(x) == sizes, "rwkv_train: ", name, " has the wrong shape");
}

Tensor empty(const Tensor &like, const Sizes &sizes, ScalarType dtype) {
  return torch::stable::new_empty(like, sizes, dtype);
}

Tensor like(const Tensor &x) { return empty(x, sizes_of(x), x.scalar_type()); }

const void *in(const Tensor &x) { return x.const_data_ptr(); }
const float *floats(const Tensor &x) { return static_cast<const float *>(x.const_data_ptr()); }
void *out(Tensor &x) { return x.mutable_data_ptr(); }
float *out_floats(Tensor &x) { return static_cast<float *>(x.mutable_data_ptr()); }

int storage(const Tensor &x) {
  const ScalarType dtype = x.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
                  "rwkv_train: the CUDA engine computes in float32, bfloat16 and float16");
  return dtype == ScalarType::Float ? 0 : dtype == ScalarType::BFloat16 ? 1 : 2;
}

// The card of x as the current one, and torch's current stream there.
struct Card {
  torch::stable::accelerator::DeviceGuard guard;
  torch::stable::accelerator::Stream current;
  explicit Card(const Tensor &x)
      : guard(x.get_device_index()), current(torch::stable::accelerator::getCurrentStream(x.get_device_index())) {}
  void *stream() const { return current.nativeHandle(); }
};

void launched(const char *error) { STD_TORCH_CHECK(!error, "rwkv_train: a CUDA kernel could not be launched: ", error); }

void check_wkv4(const Tensor &w, const Tensor &u, const Tensor &k, const Tensor &v, const Tensor &state) {
  STD_TORCH_CHECK(k.dim() == 3 && k.numel() > 0, "rwkv_train: k must be (B, T, C) and not empty");
  const int64_t B = k.size(0), C = k.size(2);
  check(w, "w", {C}, ScalarType::Float, k), check(u, "u", {C}, ScalarType::Float, k);
  check(k, "k", sizes_of(k), k.scalar_type(), k), check(v, "v", sizes_of(k), k.scalar_type(), k);
  check(state, "state", {B, 3, C}, ScalarType::Float, k);
}

Sizes saved_sizes(const Tensor &k) { return {k.size(0), (k.size(1) - 1) / RWKV_CHUNK, 3, k.size(2)}; }

std::tuple<Tensor, Tensor, Tensor> wkv4(const Tensor &w, const Tensor &u, const Tensor &k, const Tensor &v,
                                        const Tensor &state, int64_t segments) {
  check_wkv4(w, u, k, v, state);
  const Card card(k);
  const int64_t B = k.size(0), T = k.size(1), C = k.size(2), scratch_rows = segments > 1 ? 6 * B * segments : 0;
  Tensor y = like(k), new_state = like(state), saved = empty(state, saved_sizes(k), ScalarType::Float),
         scratch = empty(state, {scratch_rows * C}, ScalarType::Float);
  launched(rwkv_wkv4_forward(storage(k), B, T, C, segments, floats(w), floats(u), in(k), in(v), floats(state), out(y),
                             out_floats(new_state), out_floats(saved), out_floats(scratch), card.stream()));
  return {y, new_state, saved};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> wkv4_backward(const Tensor &w, const Tensor &u, const Tensor &k,
                                                                 const Tensor &v, const Tensor &state,
                                                                 const Tensor &saved, const Tensor &gy,
                                                                 std::optional<Tensor> gstate, int64_t segments) {
  check_wkv4(w, u, k, v, state);
  check(saved, "saved", saved_sizes(k), ScalarType::Float, k);
  check(gy, "the gradient of y", sizes_of(k), k.scalar_type(), k);
  if (gstate) check(*gstate, "the gradient of the state", sizes_of(state), ScalarType::Float, k);
  const Card card(k);
  const int64_t B = k.size(0), T = k.size(1), C = k.size(2), scratch_rows = segments > 1 ? 10 * B * segments : 2 * B;
  Tensor dk = like(k), dv = like(k), dw = like(w), du = like(u), dstate = like(state),
         scratch = empty(state, {scratch_rows * C}, ScalarType::Float);
  launched(rwkv_wkv4_backward(storage(k), B, T, C, segments, floats(w), floats(u), in(k), in(v), floats(state),
                              floats(saved), in(gy), gstate ? floats(*gstate) : nullptr, out(dk), out(dv),
                              out_floats(dw), out_floats(du), out_floats(dstate), out_floats(scratch), card.stream()));
  return {dw, du, dk, dv, dstate};
}

std::vector<const float *> check_mixes(const Tensor &x, const std::optional<Tensor> &previous,
                                       const std::vector<Tensor> &mixes) {
  STD_TORCH_CHECK(x.dim() == 3 && x.numel() > 0, "rwkv_train: x must be (B, T, C) and not empty");
  STD_TORCH_CHECK(mixes.size() > 0 && mixes.size() <= 8, "rwkv_train: shift_mix takes 1 to 8 mixes");
  check(x, "x", sizes_of(x), x.scalar_type(), x);
  if (previous) check(*previous, "previous", {x.size(0), x.size(2)}, x.scalar_type(), x);
  std::vector<const float *> pointers;
  for (const Tensor &mix : mixes) {  // C elements in whatever shape: the checkpoints have (1, 1, C)
    STD_TORCH_CHECK(mix.numel() == x.size(2), "rwkv_train: a mix has the wrong number of elements");
    check(mix, "a mix", sizes_of(mix), ScalarType::Float, x);
    pointers.push_back(floats(mix));
  }
  return pointers;
}

std::vector<Tensor> shift_mix(const Tensor &x, std::optional<Tensor> previous, std::vector<Tensor> mixes) {
  const std::vector<const float *> weights = check_mixes(x, previous, mixes);
  const Card card(x);
  std::vector<Tensor> outputs;
  std::vector<void *> pointers;
  for (size_t i = 0; i < mixes.size(); ++i) {
    outputs.push_back(like(x));
    pointers.push_back(out(outputs[i]));
  }
  launched(rwkv_shift_mix(storage(x), x.size(0), x.size(1), x.size(2), int64_t(mixes.size()), in(x),
                          previous ? in(*previous) : nullptr, weights.data(), pointers.data(), card.stream()));
  return outputs;
}

std::tuple<Tensor, Tensor, std::vector<Tensor>> shift_mix_backward(const Tensor &x, std::optional<Tensor> previous,
                                                                   std::vector<Tensor> mixes,
                                                                   std::vector<Tensor> grads) {
  const std::vector<const float *> weights = check_mixes(x, previous, mixes);
  STD_TORCH_CHECK(grads.size() == mixes.size(), "rwkv_train: shift_mix needs one gradient per mix");
  const Card card(x);
  const int64_t B = x.size(0), T = x.size(1), C = x.size(2), count = int64_t(mixes.size());
  std::vector<const void *> gradients;
  std::vector<Tensor> dmixes;
  std::vector<float *> pointers;
  for (size_t i = 0; i < mixes.size(); ++i) {
    check(grads[i], "a gradient of shift_mix", sizes_of(x), x.scalar_type(), x);
    gradients.push_back(in(grads[i]));
    dmixes.push_back(like(mixes[i]));
    pointers.push_back(out_floats(dmixes[i]));
  }
  Tensor dx = like(x), dprevious = empty(x, {B, C}, x.scalar_type()),
         scratch = empty(x, {B * ((T + 63) / 64) * count * C}, ScalarType::Float);
  launched(rwkv_shift_mix_backward(storage(x), B, T, C, count, in(x), previous ? in(*previous) : nullptr,
                                   weights.data(), gradients.data(), out(dx), out(dprevious), pointers.data(),
                                   out_floats(scratch), card.stream()));
  return {dx, dprevious, dmixes};
}

Tensor relu_squared(const Tensor &k) {
  check(k, "k", sizes_of(k), k.scalar_type(), k);
  const Card card(k);
  Tensor h = like(k);
  launched(rwkv_relu_squared(storage(k), k.numel(), in(k), out(h), card.stream()));
  return h;
}

Tensor relu_squared_backward(const Tensor &h, const Tensor &gh) {
  check(h, "h", sizes_of(h), h.scalar_type(), h);
  check(gh, "the gradient of relu_squared", sizes_of(h), h.scalar_type(), h);
  const Card card(h);
  Tensor dk = like(h);
  launched(rwkv_relu_squared_backward(storage(h), h.numel(), in(h), in(gh), out(dk), card.stream()));
  return dk;
}

Tensor sigmoid_gate(const Tensor &r, const Tensor &y) {
  check(r, "r", sizes_of(r), r.scalar_type(), r), check(y, "y", sizes_of(r), r.scalar_type(), r);
  const Card card(r);
  Tensor o = like(r);
  launched(rwkv_sigmoid_gate(storage(r), r.numel(), in(r), in(y), out(o), card.stream()));
  return o;
}

std::tuple<Tensor, Tensor> sigmoid_gate_backward(const Tensor &r, const Tensor &y, const Tensor &go) {
  check(r, "r", sizes_of(r), r.scalar_type(), r), check(y, "y", sizes_of(r), r.scalar_type(), r);
  check(go, "the gradient of sigmoid_gate", sizes_of(r), r.scalar_type(), r);
  const Card card(r);
  Tensor dr = like(r), dy = like(r);
  launched(rwkv_sigmoid_gate_backward(storage(r), r.numel(), in(r), in(y), in(go), out(dr), out(dy), card.stream()));
  return {dr, dy};
}
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rwkv_train, CUDA, m) {
  m.impl("wkv4_in_segments", TORCH_BOX(&wkv4));
  m.impl("wkv4_in_segments_backward", TORCH_BOX(&wkv4_backward));
  m.impl("shift_mix", TORCH_BOX(&shift_mix));
  m.impl("shift_mix_backward", TORCH_BOX(&shift_mix_backward));
  m.impl("relu_squared", TORCH_BOX(&relu_squared));
  m.impl("relu_squared_backward", TORCH_BOX(&relu_squared_backward));
  m.impl("sigmoid_gate", TORCH_BOX(&sigmoid_gate));
  m.impl("sigmoid_gate_backward", TORCH_BOX(&sigmoid_gate_backward));
}
