// CPU implementations of the operators that rwkv_train/ops/registration/elementwise.py declares.
#include <memory>

#include "binding_cpu.h"
#include "elementwise_cpu.h"

namespace {
using namespace rwkv::binding;

template <class S>
rwkv::ShiftMix<S> shift_mix_inputs(const Tensor &x, const std::optional<Tensor> &previous, const std::vector<Tensor> &mixes,
                                   const std::optional<Tensor> &starts) {
  const int64_t B = x.size(0), T = x.size(1), C = x.size(2), count = int64_t(mixes.size());
  STD_TORCH_CHECK(count > 0 && count <= rwkv::MAX_MIXES, "rwkv_train: shift_mix takes 1 to 8 mixes");
  check(x, "x", {B, T, C}, x.scalar_type());
  if (previous) check(*previous, "previous", {B, C}, x.scalar_type());
  rwkv::ShiftMix<S> a{};
  a.B = B, a.T = T, a.C = C, a.count = count, a.x = in<S>(x), a.previous = previous ? in<S>(*previous) : nullptr;
  a.starts = starts_or_null(starts, x);
  for (size_t i = 0; i < mixes.size(); ++i) {  // C elements in any shape: checkpoints have (1, 1, C)
    STD_TORCH_CHECK(mixes[i].numel() == C, "rwkv_train: a mix has the wrong number of elements");
    check(mixes[i], "a mix", sizes_of(mixes[i]), ScalarType::Float);
    a.mix[i] = in<float>(mixes[i]);
  }
  return a;
}

std::vector<Tensor> shift_mix(const Tensor &x, std::optional<Tensor> previous, std::vector<Tensor> mixes,
                              std::optional<Tensor> starts) {
  std::vector<Tensor> outputs;
  with_storage(x, [&](auto storage) {
    using S = decltype(storage);
    rwkv::ShiftMix<S> a = shift_mix_inputs<S>(x, previous, mixes, starts);
    for (size_t i = 0; i < mixes.size(); ++i) {
      outputs.push_back(new_like(x));
      a.out[i] = out<S>(outputs[i]);
    }
    over_tasks(a.tasks(), a.B * a.T * a.C, [&](int64_t begin, int64_t end) { rwkv::shift_mix_forward(a, begin, end); });
  });
  return outputs;
}

// Returns dx (B, T, C), dprevious (B, C) and the gradient of each mix in its shape.
std::tuple<Tensor, Tensor, std::vector<Tensor>> shift_mix_backward(const Tensor &x, std::optional<Tensor> previous,
                                                                   std::vector<Tensor> mixes,
                                                                   std::optional<Tensor> starts,
                                                                   std::vector<Tensor> grads) {
  Tensor dx = new_like(x), dprevious = new_tensor(x, {x.size(0), x.size(2)}, x.scalar_type());
  std::vector<Tensor> dmixes;
  with_storage(x, [&](auto storage) {
    using S = decltype(storage);
    rwkv::ShiftMix<S> a = shift_mix_inputs<S>(x, previous, mixes, starts);
    STD_TORCH_CHECK(grads.size() == mixes.size(), "rwkv_train: shift_mix needs one gradient per mix");
    for (size_t i = 0; i < grads.size(); ++i) {
      check(grads[i], "a gradient of shift_mix", sizes_of(x), x.scalar_type());
      a.grad[i] = in<S>(grads[i]);
    }
    Tensor task_sums = new_tensor(x, {a.tasks(), a.count, a.C}, ScalarType::Float);
    a.dx = out<S>(dx), a.dprevious = out<S>(dprevious), a.dmix = out<float>(task_sums);
    over_tasks(a.tasks(), a.B * a.T * a.C, [&](int64_t begin, int64_t end) {
      const std::unique_ptr<float[]> carry(new float[size_t(a.C)]);
      rwkv::shift_mix_backward(a, carry.get(), begin, end);
    });
    for (int64_t i = 0; i < a.count; ++i) {
      dmixes.push_back(new_like(mixes[size_t(i)]));
      rwkv::sum_rows(out<float>(task_sums) + i * a.C, out<float>(dmixes[size_t(i)]), a.tasks(), a.C, a.count * a.C);
    }
  });
  return {dx, dprevious, dmixes};
}

Tensor relu_squared(const Tensor &k) {
  check(k, "k", sizes_of(k), k.scalar_type());
  Tensor h = new_like(k);
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
  Tensor dk = new_like(h);
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
  Tensor o = new_like(r);
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
  Tensor dr = new_like(r), dy = new_like(r);
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
  m.impl("shift_mix", TORCH_BOX(&shift_mix));
  m.impl("shift_mix_backward", TORCH_BOX(&shift_mix_backward));
  m.impl("relu_squared", TORCH_BOX(&relu_squared));
  m.impl("relu_squared_backward", TORCH_BOX(&relu_squared_backward));
  m.impl("sigmoid_gate", TORCH_BOX(&sigmoid_gate));
  m.impl("sigmoid_gate_backward", TORCH_BOX(&sigmoid_gate_backward));
}
