// What the CUDA bindings of every operator family share. No CUDA header is needed: g++ compiles them. Memory comes from
// torch's caching allocator, launches go to its current stream on the tensors' device, and nothing waits: CUDA graphs
// can capture every call.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include "binding.h"
#include "kernels.h"

namespace rwkv::binding {

inline void check(const Tensor &x, const char *name, const Sizes &sizes, ScalarType dtype, const Tensor &same_device) {
  STD_TORCH_CHECK(x.is_cuda() && x.get_device_index() == same_device.get_device_index(), "rwkv_train: ", name,
                  " is on another device");
  STD_TORCH_CHECK(x.scalar_type() == dtype, "rwkv_train: ", name, " has the wrong dtype");
  STD_TORCH_CHECK(x.is_contiguous(), "rwkv_train: ", name, " must be contiguous");
  STD_TORCH_CHECK(sizes_of(x) == sizes, "rwkv_train: ", name, " has the wrong shape");
}

inline const void *in(const Tensor &x) { return x.const_data_ptr(); }
inline const float *in_floats(const Tensor &x) { return static_cast<const float *>(x.const_data_ptr()); }
inline void *out(Tensor &x) { return x.mutable_data_ptr(); }
inline float *out_floats(Tensor &x) { return static_cast<float *>(x.mutable_data_ptr()); }

// The dtype of x as kernels.h numbers it.
inline int storage(const Tensor &x) {
  const ScalarType dtype = x.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
                  "rwkv_train: the CUDA engine computes in float32, bfloat16 and float16");
  return dtype == ScalarType::Float ? 0 : dtype == ScalarType::BFloat16 ? 1 : 2;
}

// Makes the device of x the current one while it lives; stream() is torch's current stream there.
class OnDeviceOf {
 public:
  explicit OnDeviceOf(const Tensor &x)
      : guard(x.get_device_index()), current(torch::stable::accelerator::getCurrentStream(x.get_device_index())) {}
  void *stream() const { return current.nativeHandle(); }

 private:
  torch::stable::accelerator::DeviceGuard guard;
  torch::stable::accelerator::Stream current;
};

// Raises with the error message that a launcher of kernels.h returned; null is success.
inline void check_launch(const char *error) {
  STD_TORCH_CHECK(!error, "rwkv_train: a CUDA kernel could not be launched: ", error);
}

}  // namespace rwkv::binding
