// CPU implementations of the operators that rwkv_train/ops/registration/rwkv7.py declares.
#include "binding_cpu.h"
#include "rwkv7_cpu.h"

namespace {
using namespace rwkv::binding;

// Activations have one shape (B, T, C) and dtype; a parameter has C elements of float32 in any shape.
void check_inputs(const std::vector<const Tensor *> &activations, const std::vector<const Tensor *> &parameters) {
  const Tensor &x = *activations[0];
  STD_TORCH_CHECK(x.dim() == 3, "rwkv_train: (B, T, C) is needed");
  for (const Tensor *activation : activations) check(*activation, "an input", sizes_of(x), x.scalar_type());
  for (const Tensor *parameter : parameters) {
    STD_TORCH_CHECK(parameter->numel() == x.size(2), "rwkv_train: a parameter has the wrong number of elements");
    check(*parameter, "a parameter", sizes_of(*parameter), ScalarType::Float);
  }
}

// The sum over tasks of number `index` of `count` gradients of parameters, in the shape of the parameter.
Tensor sum_of(Tensor &sums, int64_t index, int64_t count, const Tensor &parameter) {
  Tensor total = new_like(parameter);
  const int64_t C = parameter.numel();
  rwkv::sum_rows(out<float>(sums) + index * C, out<float>(total), sums.size(0), C, count * C);
  return total;
}

template <class S>
rwkv::Rwkv7Keys<S> keys_inputs(const Tensor &k, const Tensor &w_delta, const Tensor &a_delta, const Tensor &w0,
                               const Tensor &a0, const Tensor &k_k, const Tensor &k_a, int64_t head_size) {
  check_inputs({&k, &w_delta, &a_delta}, {&w0, &a0, &k_k, &k_a});
  STD_TORCH_CHECK(head_size > 0 && k.size(2) % head_size == 0, "rwkv_train: heads of that size do not fit");
  return {k.size(0) * k.size(1), k.size(2),      head_size,     in<S>(k),       in<S>(w_delta), in<S>(a_delta),
          in<float>(w0),         in<float>(a0),  in<float>(k_k), in<float>(k_a)};
}

// Returns w (float32), the new k, a and b.
std::tuple<Tensor, Tensor, Tensor, Tensor> rwkv7_keys(const Tensor &k, const Tensor &w_delta, const Tensor &a_delta,
                                                      const Tensor &w0, const Tensor &a0, const Tensor &k_k,
                                                      const Tensor &k_a, int64_t head_size) {
  Tensor w = new_tensor(k, sizes_of(k), ScalarType::Float), new_k = new_like(k), a = new_like(k), b = new_like(k);
  with_storage(k, [&](auto storage) {
    using S = decltype(storage);
    rwkv::Rwkv7Keys<S> p = keys_inputs<S>(k, w_delta, a_delta, w0, a0, k_k, k_a, head_size);
    p.w = out<float>(w), p.new_k = out<S>(new_k), p.a = out<S>(a), p.b = out<S>(b);
    over_tasks(rwkv::rwkv7_tasks(p.rows), 4 * k.numel(),
               [&](int64_t begin, int64_t end) { rwkv::rwkv7_keys_forward(p, begin, end); });
  });
  return {w, new_k, a, b};
}

// Returns the gradients of the seven tensors.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> rwkv7_keys_backward(
    const Tensor &k, const Tensor &w_delta, const Tensor &a_delta, const Tensor &w0, const Tensor &a0,
    const Tensor &k_k, const Tensor &k_a, int64_t head_size, const Tensor &gw, const Tensor &gk, const Tensor &ga,
    const Tensor &gb) {
  Tensor dk = new_like(k), dw_delta = new_like(k), da_delta = new_like(k);
  Tensor sums = new_tensor(k, {rwkv::rwkv7_tasks(k.size(0) * k.size(1)), 4, k.size(2)}, ScalarType::Float);
  check_inputs({&k, &gk, &ga, &gb}, {}), check(gw, "the gradient of w", sizes_of(k), ScalarType::Float);
  with_storage(k, [&](auto storage) {
    using S = decltype(storage);
    rwkv::Rwkv7Keys<S> p = keys_inputs<S>(k, w_delta, a_delta, w0, a0, k_k, k_a, head_size);
    p.gw = in<float>(gw), p.gk = in<S>(gk), p.ga = in<S>(ga), p.gb = in<S>(gb);
    p.dk = out<S>(dk), p.dw_delta = out<S>(dw_delta), p.da_delta = out<S>(da_delta), p.sums = out<float>(sums);
    over_tasks(rwkv::rwkv7_tasks(p.rows), 4 * k.numel(),
               [&](int64_t begin, int64_t end) { rwkv::rwkv7_keys_backward(p, begin, end); });
  });
  return {dk, dw_delta, da_delta, sum_of(sums, 0, 4, w0), sum_of(sums, 1, 4, a0), sum_of(sums, 2, 4, k_k),
          sum_of(sums, 3, 4, k_a)};
}

template <class S>
rwkv::Rwkv7Values<S> values_inputs(const Tensor &v, const Tensor &v_first, const Tensor &v_delta, const Tensor &v0) {
  check_inputs({&v, &v_first, &v_delta}, {&v0});
  return {v.size(0) * v.size(1), v.size(2), in<S>(v), in<S>(v_first), in<S>(v_delta), in<float>(v0)};
}

Tensor rwkv7_values(const Tensor &v, const Tensor &v_first, const Tensor &v_delta, const Tensor &v0) {
  Tensor result = new_like(v);
  with_storage(v, [&](auto storage) {
    using S = decltype(storage);
    rwkv::Rwkv7Values<S> p = values_inputs<S>(v, v_first, v_delta, v0);
    p.out = out<S>(result);
    over_tasks(rwkv::rwkv7_tasks(p.rows), 2 * v.numel(),
               [&](int64_t begin, int64_t end) { rwkv::rwkv7_values_forward(p, begin, end); });
  });
  return result;
}

// Returns the gradients of the four tensors.
std::tuple<Tensor, Tensor, Tensor, Tensor> rwkv7_values_backward(const Tensor &v, const Tensor &v_first,
                                                                 const Tensor &v_delta, const Tensor &v0,
                                                                 const Tensor &gout) {
  Tensor dv = new_like(v), dv_first = new_like(v), dv_delta = new_like(v);
  Tensor sums = new_tensor(v, {rwkv::rwkv7_tasks(v.size(0) * v.size(1)), v.size(2)}, ScalarType::Float);
  check_inputs({&v, &gout}, {});
  with_storage(v, [&](auto storage) {
    using S = decltype(storage);
    rwkv::Rwkv7Values<S> p = values_inputs<S>(v, v_first, v_delta, v0);
    p.gout = in<S>(gout), p.sums = out<float>(sums);
    p.dv = out<S>(dv), p.dv_first = out<S>(dv_first), p.dv_delta = out<S>(dv_delta);
    over_tasks(rwkv::rwkv7_tasks(p.rows), 2 * v.numel(),
               [&](int64_t begin, int64_t end) { rwkv::rwkv7_values_backward(p, begin, end); });
  });
  return {dv, dv_first, dv_delta, sum_of(sums, 0, 1, v0)};
}
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rwkv_train, CPU, m) {
  m.impl("rwkv7_keys", TORCH_BOX(&rwkv7_keys));
  m.impl("rwkv7_keys_backward", TORCH_BOX(&rwkv7_keys_backward));
  m.impl("rwkv7_values", TORCH_BOX(&rwkv7_values));
  m.impl("rwkv7_values_backward", TORCH_BOX(&rwkv7_values_backward));
}
