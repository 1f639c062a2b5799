// MobileNetV2's kernels on CUDA, channels last. Maps and sums are f32; what a product reads is T, f32 or f16. [ours]
//
// One work item per index, no shared memory, no barrier, so that the same text compiles as C++ and runs as a loop on a
// machine without a GPU: that is how its tests run (gpu/tests.rs). NVRTC compiles it for the GPU at hand when a model is
// loaded. Matrix products are cuBLAS's; what surrounds them is here.

#ifdef __CUDACC__
#define ON_DEVICE static __device__ __forceinline__
#define KERNEL(name, type)                                                               \
  extern "C" __global__ void name##_##type(const long long items, const Args a) {       \
    const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;                \
    if (i < items) name<type>(i, a);                                                     \
  }
#else
#define ON_DEVICE static inline
#define KERNEL(name, type)                                                               \
  extern "C" void name##_##type(const long long items, const Args *a) {                  \
    for (long long i = 0; i < items; i++) name<type>(i, *a);                             \
  }
#include <math.h>
#include <string.h>
#endif

// As `Args` in gpu/mod.rs. Addresses are the device's; what a kernel does not use is 0.
struct Args {
  unsigned long long input, weight, bias, before, output, wide;
  int height, width, channels;
  int out_height, out_width;
  int stride, top, left;
  int strips, at, row;
  float scale[3], shift[3], power;
};

typedef float f32;
struct f16 {
  unsigned short bits;
};

#ifdef __CUDACC__
ON_DEVICE float widened(const f16 h) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h.bits));
  return f;
}
ON_DEVICE f16 rounded(const float f, f16) {
  f16 h;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h.bits) : "f"(f));
  return h;
}
#else
ON_DEVICE float widened(const f16 h) {
  const unsigned sign = (unsigned)(h.bits & 0x8000) << 16, exponent = h.bits >> 10 & 31, fraction = h.bits & 1023;
  float f;
  if (exponent == 0) {
    f = ldexpf((float)fraction, -24);
    return sign ? -f : f;
  }
  const unsigned bits = sign | (exponent == 31 ? 255u : exponent + 112) << 23 | fraction << 13;
  memcpy(&f, &bits, 4);
  return f;
}
ON_DEVICE f16 rounded(const float f, f16) {
  unsigned bits;
  memcpy(&bits, &f, 4);
  const unsigned short sign = bits >> 16 & 0x8000;
  const float size = fabsf(f);
  if (!(size < 65520.0f)) return f16{(unsigned short)(sign | (f != f ? 0x7e00 : 0x7c00))};
  int exponent;
  frexpf(size, &exponent);
  // The step of f16 at this size; nearbyintf rounds halves to even, as the GPU does.
  const int step = size < 0x1p-14f ? -24 : exponent - 11;
  const float units = nearbyintf(ldexpf(size, -step));
  const unsigned magnitude = step == -24 ? (unsigned)units : ((unsigned)(step + 24) << 10) + (unsigned)units;
  return f16{(unsigned short)(sign | magnitude)};
}
#endif
ON_DEVICE float widened(const f32 x) { return x; }
ON_DEVICE f32 rounded(const float x, f32) { return x; }

// As many neighbouring channels as 16 bytes hold of T; every layer has a multiple of 8.
template <typename T, typename Value = T>
struct Vector {
  static const int N = 16 / sizeof(T);
  alignas(16) Value v[N];
};

// NaN stays NaN, so that a broken weight is seen downstream.
ON_DEVICE float relu6(const float x) { return x < 0.0f ? 0.0f : x > 6.0f ? 6.0f : x; }

// 3x3 convolution of an 8-bit RGB image, normalised on the way, with bias and ReLU6, to 32 channels.
// One item: one pixel, eight channels. weight: 27 x 32.
template <typename T>
ON_DEVICE void stem(const long long i, const Args &a) {
  const int C = 32, G = 8;
  const int c = (int)(i % (C / G)) * G;
  const long long pixel = i / (C / G);
  const int x = (int)(pixel % a.out_width), y = (int)(pixel / a.out_width % a.out_height);
  const long long n = pixel / a.out_width / a.out_height;
  const unsigned char *image = (const unsigned char *)a.input + n * a.height * a.width * 3;
  const float *weight = (const float *)a.weight + c, *bias = (const float *)a.bias + c;
  float sum[G];
  for (int k = 0; k < G; k++) sum[k] = bias[k];
  for (int ky = 0; ky < 3; ky++) {
    const int iy = y * a.stride + ky - a.top;
    if (iy < 0 || iy >= a.height) continue;
    for (int kx = 0; kx < 3; kx++) {
      const int ix = x * a.stride + kx - a.left;
      if (ix < 0 || ix >= a.width) continue;
      for (int rgb = 0; rgb < 3; rgb++) {
        const float v = (float)image[((long long)iy * a.width + ix) * 3 + rgb] * a.scale[rgb] + a.shift[rgb];
        const float *w = weight + ((rgb * 3 + ky) * 3 + kx) * C;
        for (int k = 0; k < G; k++) sum[k] += w[k] * v;
      }
    }
  }
  T *out = (T *)a.output + pixel * C + c;
  for (int k = 0; k < G; k++) out[k] = rounded(relu6(sum[k]), T());
}

// 3x3 depthwise convolution with bias and ReLU6, of an f32 map. With `before` that is the product before it, without its bias and
// ReLU6: they are applied as it is read, which saves a pass over the largest tensors of the network.
// One item: `R` pixels side by side, a vector of channels. weight: 9 x channels.
const int R = 4;
template <typename T, int S>
ON_DEVICE void depthwise_at(const long long i, const Args &a) {
  const int V = Vector<T>::N;
  const int groups = a.channels / V, runs = (a.out_width + R - 1) / R;
  const int c = (int)(i % groups) * V;
  const int x0 = (int)(i / groups % runs) * R, y = (int)(i / groups / runs % a.out_height);
  const long long n = i / groups / runs / a.out_height;
  const float *in = (const float *)a.input + n * a.height * a.width * a.channels + c;
  const float *weight = (const float *)a.weight + c, *bias = (const float *)a.bias + c;
  const float *before = a.before ? (const float *)a.before + c : 0;
  float sum[R][V];
  for (int r = 0; r < R; r++)
    for (int k = 0; k < V; k++) sum[r][k] = bias[k];
  for (int ky = 0; ky < 3; ky++) {
    const int iy = y * S + ky - a.top;
    if (iy < 0 || iy >= a.height) continue;
#pragma unroll
    for (int j = 0; j < (R - 1) * S + 3; j++) {
      const int ix = x0 * S + j - a.left;
      if (ix < 0 || ix >= a.width) continue;
      Vector<T, float> read = *(const Vector<T, float> *)(in + ((long long)iy * a.width + ix) * a.channels);
      if (before)
        for (int k = 0; k < V; k++) read.v[k] = relu6(read.v[k] + before[k]);
#pragma unroll
      for (int r = 0; r < R; r++) {
        const int kx = j - r * S;
        if (kx < 0 || kx > 2) continue;
        const float *w = weight + (long long)(ky * 3 + kx) * a.channels;
        for (int k = 0; k < V; k++) sum[r][k] += w[k] * read.v[k];
      }
    }
  }
  for (int r = 0; r < R && x0 + r < a.out_width; r++) {
    Vector<T> out;
    for (int k = 0; k < V; k++) out.v[k] = rounded(relu6(sum[r][k]), T());
    *(Vector<T> *)((T *)a.output + ((n * a.out_height + y) * a.out_width + x0 + r) * a.channels + c) = out;
  }
}

template <typename T>
ON_DEVICE void depthwise(const long long i, const Args &a) {
  if (a.stride == 1)
    depthwise_at<T, 1>(i, a);
  else
    depthwise_at<T, 2>(i, a);
}

// The end of a block: a product (f32) with its bias, and the block's input where it has one (`before`, f32), rounded once. `wide`:
// where the sum goes as it is, too (f32, may be the product's own place). One item: a vector of channels.
template <typename T>
ON_DEVICE void finish(const long long i, const Args &a) {
  const int V = Vector<T>::N;
  const float *product = (const float *)a.input + i * V;
  const float *bias = (const float *)a.bias + i * V % a.channels;
  alignas(16) float sum[V];
  for (int k = 0; k < V; k++) sum[k] = product[k] + bias[k];
  if (a.before)
    for (int k = 0; k < V; k++) sum[k] += ((const float *)a.before)[i * V + k];
  if (a.wide)
    for (int k = 0; k < V; k++) ((float *)a.wide)[i * V + k] = sum[k];
  Vector<T> out;
  for (int k = 0; k < V; k++) out.v[k] = rounded(sum[k], T());
  ((Vector<T> *)a.output)[i] = out;
}

// What GeM sums, floor and power as the processor's; power 0: the value itself.
ON_DEVICE float raised(const float v, const float power) {
  if (power == 0.0f) return v;
  const float x = v < 1e-6f ? 1e-6f : v;
  return power == 3.0f ? x * x * x : powf(x, power);
}

// Sums of a tap over one of `strips` parts of its pixels. One item: image, strip, channel. Always the same order, so
// that the same image gives the same bytes.
template <typename T>
ON_DEVICE void pool_strip(const long long i, const Args &a) {
  const int c = (int)(i % a.channels), strip = (int)(i / a.channels % a.strips);
  const long long n = i / a.channels / a.strips;
  const int pixels = a.height * a.width;
  const T *in = (const T *)a.input + n * pixels * a.channels + c;
  float sum = 0.0f;
  for (int p = strip; p < pixels; p += a.strips) sum += raised(widened(in[(long long)p * a.channels]), a.power);
  ((float *)a.output)[i] = sum;
}

// One channel of the descriptor of one image: the mean, and its root. Item: image, channel.
template <typename T>
ON_DEVICE void pool(const long long i, const Args &a) {
  const int c = (int)(i % a.channels);
  const long long n = i / a.channels;
  const float *in = (const float *)a.input + n * a.strips * a.channels + c;
  float sum = 0.0f;
  for (int s = 0; s < a.strips; s++) sum += in[(long long)s * a.channels];
  const float mean = sum / (float)(a.height * a.width);
  ((float *)a.output)[n * a.row + a.at + c] = a.power == 0.0f ? mean : powf(mean, 1.0f / a.power);
}

KERNEL(stem, f32)
KERNEL(stem, f16)
KERNEL(depthwise, f32)
KERNEL(depthwise, f16)
KERNEL(finish, f32)
KERNEL(finish, f16)
KERNEL(pool_strip, f32)
KERNEL(pool_strip, f16)
KERNEL(pool, f32)
KERNEL(pool, f16)
