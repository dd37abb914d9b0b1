// All CUDA kernels in one library for the CPU; the emulator knows one launch at a time.
#include "elementwise.cu"
#include "wkv4.cu"
