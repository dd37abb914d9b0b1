// The launchers of the CUDA kernels, as plain C functions: the bindings call them, and so do the tests, by ctypes.
//
// Each returns null, or an error message. `storage` is the dtype of k, v, y, x …: 0 float, 1 bfloat16, 2 half;
// everything else is float. All tensors are contiguous and on one GPU; `stream` is a cudaStream_t. Nothing here
// waits for the GPU or allocates on it.
#pragma once

#include <cstdint>

extern "C" {

// One chunk: the steps between two saved states of wkv4, and the steps that a block of the parallel kernel works on.
constexpr int64_t RWKV_CHUNK = 64;

// wkv4: k, v, y (B, T, C); w, u (C); state, new_state (B, 3, C); saved (B, (T - 1) / 64, 3, C).
// `segments`: 0 runs the sequential kernel, n > 0 the time-parallel one with time cut into n segments (at most one per
// chunk). scratch: 6 · B · segments · C floats, where segments > 1.
const char *rwkv_wkv4_forward(int storage, int64_t B, int64_t T, int64_t C, int64_t segments, const float *w,
                              const float *u, const void *k, const void *v, const float *state, void *y,
                              float *new_state, float *saved, float *scratch, void *stream);

// gy, dk, dv (B, T, C); gstate (B, 3, C) or null for zeros; dw, du (C); dstate (B, 3, C).
// scratch: 2 · B · C floats; where segments > 1, 10 · B · segments · C.
const char *rwkv_wkv4_backward(int storage, int64_t B, int64_t T, int64_t C, int64_t segments, const float *w,
                               const float *u, const void *k, const void *v, const float *state, const float *saved,
                               const void *gy, const float *gstate, void *dk, void *dv, float *dw, float *du,
                               float *dstate, float *scratch, void *stream);

// shift_mix: `count` (at most 8) mixes of C floats, outputs, gradients and gradients of the mixes, as arrays of
// pointers on the host. previous (B, C) or null for zeros. scratch: B · ceil(T / 64) · count · C floats.
const char *rwkv_shift_mix(int storage, int64_t B, int64_t T, int64_t C, int64_t count, const void *x,
                           const void *previous, const float *const *mixes, void *const *outputs, void *stream);
const char *rwkv_shift_mix_backward(int storage, int64_t B, int64_t T, int64_t C, int64_t count, const void *x,
                                    const void *previous, const float *const *mixes, const void *const *gradients,
                                    void *dx, void *dprevious, float *const *dmixes, float *scratch, void *stream);

// Element-wise on n elements: h = relu(k)² and, from h and its gradient, that of k; o = σ(r) y and back.
const char *rwkv_relu_squared(int storage, int64_t n, const void *k, void *h, void *stream);
const char *rwkv_relu_squared_backward(int storage, int64_t n, const void *h, const void *gh, void *dk, void *stream);
const char *rwkv_sigmoid_gate(int storage, int64_t n, const void *r, const void *y, void *o, void *stream);
const char *rwkv_sigmoid_gate_backward(int storage, int64_t n, const void *r, const void *y, const void *go, void *dr,
                                       void *dy, void *stream);
}
