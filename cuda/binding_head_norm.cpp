// CPU implementations of the operators that rwkv_train/ops/registration/head_norm.py declares.
#include "binding_cpu.h"
#include "head_norm_cpu.h"

namespace {
using namespace rwkv::binding;

using Bonus = std::optional<Tensor>;  // r, k, v and r_k: all or none

template <class S>
rwkv::HeadNorm<S> inputs(const Tensor &y, const Tensor &gate, const Tensor &weight, const Tensor &bias, const Bonus &r,
                         const Bonus &k, const Bonus &v, const Bonus &r_k, int64_t head_size, double eps) {
  STD_TORCH_CHECK(y.dim() == 3 && head_size > 0 && y.size(2) % head_size == 0,
                  "rwkv_train: y must be (B, T, C) with heads of that size");
  const int64_t C = y.size(2);
  check(y, "y", sizes_of(y), y.scalar_type()), check(gate, "gate", sizes_of(y), y.scalar_type());
  check(weight, "weight", {C}, ScalarType::Float), check(bias, "bias", {C}, ScalarType::Float);
  rwkv::HeadNorm<S> p{y.size(0) * y.size(1), C, head_size, float(eps), in<S>(y), in<S>(gate), in<float>(weight), in<float>(bias)};
  STD_TORCH_CHECK(bool(r) == bool(k) && bool(r) == bool(v) && bool(r) == bool(r_k), "rwkv_train: r, k, v, r_k: all or none");
  if (!r) return p;
  for (const Bonus *x : {&r, &k, &v}) check(**x, "r, k or v", sizes_of(y), y.scalar_type());
  STD_TORCH_CHECK(r_k->numel() == C, "rwkv_train: r_k has the wrong number of elements");
  check(*r_k, "r_k", sizes_of(*r_k), ScalarType::Float);
  p.r = in<S>(*r), p.k = in<S>(*k), p.v = in<S>(*v), p.r_k = in<float>(*r_k);
  return p;
}

Tensor head_norm(const Tensor &y, const Tensor &gate, const Tensor &weight, const Tensor &bias, Bonus r, Bonus k,
                 Bonus v, Bonus r_k, int64_t head_size, double eps) {
  Tensor result = new_like(y);
  with_storage(y, [&](auto storage) {
    using S = decltype(storage);
    rwkv::HeadNorm<S> p = inputs<S>(y, gate, weight, bias, r, k, v, r_k, head_size, eps);
    p.out = out<S>(result);
    over_tasks(p.tasks(), 4 * y.numel(), [&](int64_t begin, int64_t end) { rwkv::head_norm_forward(p, begin, end); });
  });
  return result;
}

// Returns the gradients of y, gate, weight, bias, r, k, v and r_k; of the last four without elements where they are none.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> head_norm_backward(
    const Tensor &y, const Tensor &gate, const Tensor &weight, const Tensor &bias, Bonus r, Bonus k, Bonus v, Bonus r_k,
    int64_t head_size, double eps, const Tensor &gout) {
  const auto like = [&](const Bonus &x) { return x ? new_like(*x) : new_tensor(y, {0}, ScalarType::Float); };
  Tensor dy = new_like(y), dgate = new_like(y), dweight = new_like(weight), dbias = new_like(bias), dr = like(r),
         dk = like(k), dv = like(v), dr_k = like(r_k);
  check(gout, "the gradient of head_norm", sizes_of(y), y.scalar_type());
  with_storage(y, [&](auto storage) {
    using S = decltype(storage);
    rwkv::HeadNorm<S> p = inputs<S>(y, gate, weight, bias, r, k, v, r_k, head_size, eps);
    Tensor sums = new_tensor(y, {p.tasks(), 3, p.C}, ScalarType::Float);
    p.gout = in<S>(gout), p.dy = out<S>(dy), p.dgate = out<S>(dgate), p.sums = out<float>(sums);
    if (r) p.dr = out<S>(dr), p.dk = out<S>(dk), p.dv = out<S>(dv);
    over_tasks(p.tasks(), 4 * y.numel(), [&](int64_t begin, int64_t end) { rwkv::head_norm_backward(p, begin, end); });
    const auto sum = [&](int64_t index, Tensor &total) {
      rwkv::sum_rows(out<float>(sums) + index * p.C, out<float>(total), p.tasks(), p.C, 3 * p.C);
    };
    sum(0, dweight), sum(1, dbias);
    if (r) sum(2, dr_k);
  });
  return {dy, dgate, dweight, dbias, dr, dk, dv, dr_k};
}
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rwkv_train, CPU, m) {
  m.impl("head_norm", TORCH_BOX(&head_norm));
  m.impl("head_norm_backward", TORCH_BOX(&head_norm_backward));
}
