// What the CPU bindings of every operator family share. Threads are torch's own, by its parallel_for, so
// torch.set_num_threads is obeyed.
#pragma once

#include <algorithm>

#include "binding.h"
#include "cpu.h"

namespace rwkv::binding {

constexpr int64_t MIN_ELEMENTS_PER_THREAD = 16384;  // with fewer, waking a thread takes longer than the work

inline void check(const Tensor &x, const char *name, const Sizes &sizes, ScalarType dtype) {
  STD_TORCH_CHECK(x.scalar_type() == dtype, "rwkv_train: ", name, " has the wrong dtype");
  STD_TORCH_CHECK(x.is_contiguous(), "rwkv_train: ", name, " must be contiguous");
  STD_TORCH_CHECK(sizes_of(x) == sizes, "rwkv_train: ", name, " has the wrong shape");
}

template <class S> const S *in(const Tensor &x) { return static_cast<const S *>(x.const_data_ptr()); }
template <class S> S *out(Tensor &x) { return static_cast<S *>(x.mutable_data_ptr()); }

// Calls body with a value of the storage type that belongs to x's dtype.
template <class Body> void with_storage(const Tensor &x, const Body &body) {
  if (x.scalar_type() == ScalarType::Float)
    body(float());
  else if (x.scalar_type() == ScalarType::BFloat16)
    body(bf16());
  else
    STD_TORCH_CHECK(false, "rwkv_train: the C++ engine computes in float32 and bfloat16");
}

// Calls body(begin, end) for ranges of tasks on torch's threads; `elements` is the size of all tasks together.
template <class Body> void over_tasks(int64_t tasks, int64_t elements, const Body &body) {
  const int64_t grain = std::max<int64_t>(1, MIN_ELEMENTS_PER_THREAD * tasks / std::max<int64_t>(elements, 1));
  torch::stable::parallel_for(0, tasks, grain, body);
}

// Where documents begin, (B, T) for x (B, T, C); null for None, which is one document.
inline const bool *starts_or_null(const std::optional<Tensor> &starts, const Tensor &x) {
  if (!starts) return nullptr;
  check(*starts, "starts", {x.size(0), x.size(1)}, ScalarType::Bool);
  return in<bool>(*starts);
}

}  // namespace rwkv::binding
