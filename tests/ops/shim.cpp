// The CPU kernels as plain C functions, so that tests call them on memory of their own: float32, one thread.
#include "elementwise_cpu.cpp"
#include "shift_mix_backward_cpu.cpp"
#include "wkv4_cpu.cpp"

#include <vector>

extern "C" void exponential(const int64_t *shape, float **p) {
  for (int64_t i = 0; i < shape[0]; ++i) p[1][i] = rwkv::exp_negative(p[0][i]);
}

extern "C" void forward(const int64_t *shape, float **p) {
  const rwkv::Wkv4Shape s{shape[0], shape[1], shape[2], shape[3], shape[4]};
  rwkv::wkv4_forward<float>(s, {p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7]}, 0, s.tasks());
}

extern "C" void backward(const int64_t *shape, float **p) {
  const rwkv::Wkv4Shape s{shape[0], shape[1], shape[2], shape[3], shape[4]};
  std::vector<float> scratch(size_t(rwkv::wkv4_scratch(s)), __builtin_nanf(""));
  const rwkv::Wkv4Backward<float> a{p[0], p[1], p[2], p[3], p[4],  p[5],  p[6],
                                    p[7], p[8], p[9], p[10], p[11], p[12]};
  rwkv::wkv4_backward(s, a, scratch.data(), 0, s.tasks());
}

extern "C" void mix(const int64_t *shape, float **p) {  // x, previous, μ, μ; two outputs
  rwkv::ShiftMix<float> a{};
  a.B = shape[0], a.T = shape[1], a.C = shape[2], a.count = 2, a.x = p[0], a.previous = p[1];
  a.mix[0] = p[2], a.mix[1] = p[3], a.out[0] = p[4], a.out[1] = p[5];
  rwkv::shift_mix_forward(a, 0, a.tasks());
}

extern "C" void mix_backward(const int64_t *shape, float **p) {  // x, previous, μ, μ, g, g; dx, dprevious, dmix
  rwkv::ShiftMix<float> a{};
  a.B = shape[0], a.T = shape[1], a.C = shape[2], a.count = 2, a.x = p[0], a.previous = p[1];
  a.mix[0] = p[2], a.mix[1] = p[3], a.grad[0] = p[4], a.grad[1] = p[5], a.dx = p[6], a.dprevious = p[7], a.dmix = p[8];
  std::vector<float> scratch(size_t(2 * a.C), __builtin_nanf(""));
  rwkv::shift_mix_backward(a, scratch.data(), 0, a.tasks());
}
