// What the bindings of every operator family and device share. torch's stable ABI is used, so that no ATen header is
// parsed: a binding compiles in seconds. Checks in bindings only guard memory; rwkv_train.ops explains user errors.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <vector>

namespace rwkv::binding {
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Sizes = std::vector<int64_t>;

inline Sizes sizes_of(const Tensor &x) {
  Sizes sizes(size_t(x.dim()));
  for (int64_t i = 0; i < x.dim(); ++i) sizes[size_t(i)] = x.size(i);
  return sizes;
}

// A new tensor on the device of `like`, not initialised.
inline Tensor new_tensor(const Tensor &like, const Sizes &sizes, ScalarType dtype) {
  return torch::stable::new_empty(like, sizes, dtype);
}

inline Tensor new_like(const Tensor &x) { return new_tensor(x, sizes_of(x), x.scalar_type()); }

}  // namespace rwkv::binding
