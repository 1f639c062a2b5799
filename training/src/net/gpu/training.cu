// What training on CUDA does beside matrix products, channels first over the whole batch (C x N x H x W), with maps in f32
// or bf16 (sums are f32 in both). [ours]
//
// One work item per index, no shared memory, no barrier, so that the same text compiles as C++ and runs as a loop on a
// machine without a GPU: that is how its tests run (gpu/tests.rs). NVRTC compiles it for the GPU at hand. Sums over a
// channel go in strips, always in the same order: the same batch gives the same bytes.

#ifdef __CUDACC__
#define ON_DEVICE static __device__ __forceinline__
#define KERNEL(name, type)                                                              \
  extern "C" __global__ void name##_##type(const long long items, const Args a) {      \
    const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;               \
    if (i < items) name<type>((unsigned)i, a);                                          \
  }
#else
#define ON_DEVICE static inline
#define KERNEL(name, type)                                                              \
  extern "C" void name##_##type(const long long items, const Args *a) {                 \
    for (long long i = 0; i < items; i++) name<type>((unsigned)i, *a);                  \
  }
#include <math.h>
#include <string.h>
#endif

// As `Args` in gpu/mod.rs. Addresses are the device's; what a kernel does not use, or may do without, is 0.
struct Args {
  unsigned long long x, y, z, norm, out;
  int channels, columns, strips;
  int images, height, width;
  int out_height, out_width;
  int stride, top, left;
  float limit;
};

typedef float f32;
struct bf16 {
  unsigned short bits;
};

ON_DEVICE float of_bits(const unsigned bits) {
#ifdef __CUDACC__
  return __uint_as_float(bits);
#else
  float f;
  memcpy(&f, &bits, 4);
  return f;
#endif
}
ON_DEVICE unsigned bits_of(const float f) {
#ifdef __CUDACC__
  return __float_as_uint(f);
#else
  unsigned bits;
  memcpy(&bits, &f, 4);
  return bits;
#endif
}
ON_DEVICE float widened(const f32 x) { return x; }
ON_DEVICE float widened(const bf16 h) { return of_bits((unsigned)h.bits << 16); }
ON_DEVICE f32 rounded(const float x, f32) { return x; }
// To the nearest, halves to even; NaN stays NaN.
ON_DEVICE bf16 rounded(const float f, bf16) {
  const unsigned bits = bits_of(f);
  const unsigned up = f != f ? bits | 0x400000u : bits + 0x7fffu + (bits >> 16 & 1u);
  return bf16{(unsigned short)(up >> 16)};
}

// NaN stays NaN, so that a broken input is seen downstream.
ON_DEVICE float clamped(const float x, const float limit) { return x < 0.0f ? 0.0f : x > limit ? limit : x; }

// `norm`, per channel: scale, shift, mean, 1 / standard deviation, each `channels` long.
struct Norm {
  float scale, shift, mean, inverse;
};
ON_DEVICE Norm norm_of(const Args &a, const unsigned c) {
  const float *n = (const float *)a.norm + c;
  return Norm{n[0], n[a.channels], n[2 * a.channels], n[3 * a.channels]};
}

// out (T) = x (f32). One item: one value.
template <typename T>
ON_DEVICE void narrow(const unsigned i, const Args &a) {
  ((T *)a.out)[i] = rounded(((const float *)a.x)[i], T());
}

// out (f32) = x (T). One item: one value.
template <typename T>
ON_DEVICE void widen(const unsigned i, const Args &a) {
  ((float *)a.out)[i] = widened(((const T *)a.x)[i]);
}

// out (T) = x (f32), or out + x with `y`. One item: one value.
template <typename T>
ON_DEVICE void join(const unsigned i, const Args &a) {
  T *out = (T *)a.out + i;
  const float x = ((const float *)a.x)[i];
  *out = rounded(a.y ? widened(*out) + x : x, T());
}

// What a 3x3 convolution at `stride` reads: out (T), (channels * 9) x columns, from x (f32), channels x N x H x W.
// One item: one value.
template <typename T>
ON_DEVICE void patches(const unsigned i, const Args &a) {
  const unsigned at = i % a.columns, k = i / a.columns;
  const unsigned c = k / 9, ky = k / 3 % 3, kx = k % 3;
  const unsigned ox = at % a.out_width, oy = at / a.out_width % a.out_height, n = at / a.out_width / a.out_height;
  const int y = (int)oy * a.stride + (int)ky - a.top, x = (int)ox * a.stride + (int)kx - a.left;
  float v = 0.0f;
  if (y >= 0 && y < a.height && x >= 0 && x < a.width)
    v = ((const float *)a.x)[(((unsigned long long)c * a.images + n) * a.height + y) * a.width + x];
  ((T *)a.out)[i] = rounded(v, T());
}

// Leaves an item's two sums of a strip.
ON_DEVICE void put_two(const unsigned i, const Args &a, const float first, const float second) {
  float *out = (float *)a.out + 2ull * i;
  out[0] = first;
  out[1] = second;
}

// A channel's two sums from its strips (x), added up in S.
template <typename S>
ON_DEVICE void sum_two(const unsigned channel, const Args &a, S &first, S &second) {
  const float *strips = (const float *)a.x + 2ull * channel * a.strips;
  for (int s = 0; s < a.strips; s++) {
    first += strips[2 * s];
    second += strips[2 * s + 1];
  }
}

// Sum and sum of squares of x (T) over one strip of a channel, around the channel's first value, so that a mean far from zero does
// no harm. out (f32): 2 per item. One item: channel, strip.
template <typename T>
ON_DEVICE void moments_strip(const unsigned i, const Args &a) {
  const unsigned c = i / a.strips;
  const T *x = (const T *)a.x + (unsigned long long)c * a.columns;
  const float about = widened(x[0]);
  float sum = 0.0f, squares = 0.0f;
  for (int at = (int)(i % a.strips); at < a.columns; at += a.strips) {
    const float d = widened(x[at]) - about;
    sum += d;
    squares += d * d;
  }
  put_two(i, a, sum, squares);
}

// A channel's norm from its strips (x) over its map (z, T), and gamma and beta (y, f32: gammas, then betas). Writes the norm and
// out (f32): means, then biased variances. One item: one channel.
template <typename T>
ON_DEVICE void moments(const unsigned i, const Args &a) {
  double sum = 0.0, squares = 0.0;
  sum_two(i, a, sum, squares);
  const double n = (double)a.columns, offset = sum / n;
  const double mean = offset + widened(((const T *)a.z)[(unsigned long long)i * a.columns]);
  const double spread = squares / n - offset * offset;
  // NaN stays: of the two comparisons none is true of it.
  const double variance = spread < 0.0 ? 0.0 : spread;
  const double inverse = 1.0 / sqrt(variance + 1e-5);
  const float *gamma = (const float *)a.y + i, *beta = gamma + a.channels;
  float *norm = (float *)a.norm + i, *out = (float *)a.out + i;
  const double scale = *gamma * inverse;
  norm[0] = (float)scale;
  norm[a.channels] = (float)(*beta - mean * scale);
  norm[2 * a.channels] = (float)mean;
  norm[3 * a.channels] = (float)inverse;
  out[0] = (float)mean;
  out[a.channels] = (float)variance;
}

// out = clamp(norm(x), 0, limit). One item: one value.
template <typename T>
ON_DEVICE void activate(const unsigned i, const Args &a) {
  const Norm n = norm_of(a, i / a.columns);
  ((T *)a.out)[i] = rounded(clamped(widened(((const T *)a.x)[i]) * n.scale + n.shift, a.limit), T());
}

// out = norm(x), and y added where there is one. One item: one value.
template <typename T>
ON_DEVICE void affine(const unsigned i, const Args &a) {
  const Norm n = norm_of(a, i / a.columns);
  float v = widened(((const T *)a.x)[i]) * n.scale + n.shift;
  if (a.y) v += widened(((const T *)a.y)[i]);
  ((T *)a.out)[i] = rounded(v, T());
}

// A value of a depthwise convolution's input: normalised and clamped where there is a norm.
template <typename T>
ON_DEVICE float read(const Args &a, const Norm &n, const T *plane, const int y, const int x) {
  const float v = widened(plane[(unsigned)y * a.width + x]);
  return a.norm ? clamped(v * n.scale + n.shift, a.limit) : v;
}

// 3x3 depthwise convolution of x by the weights y (f32, channels x 9). `columns` are the output's. One item: one output.
template <typename T>
ON_DEVICE void depthwise(const unsigned i, const Args &a) {
  const unsigned c = i / a.columns, ox = i % a.out_width, oy = i / a.out_width % a.out_height;
  // Channels and images lie one behind the other in both maps.
  const unsigned plane = i / a.out_width / a.out_height;
  const T *in = (const T *)a.x + (unsigned long long)plane * a.height * a.width;
  const float *w = (const float *)a.y + 9ull * c;
  const Norm n = a.norm ? norm_of(a, c) : Norm{1.0f, 0.0f, 0.0f, 1.0f};
  float sum = 0.0f;
  for (int ky = 0; ky < 3; ky++) {
    const int y = (int)oy * a.stride + ky - a.top;
    if (y < 0 || y >= a.height) continue;
    for (int kx = 0; kx < 3; kx++) {
      const int x = (int)ox * a.stride + kx - a.left;
      if (x >= 0 && x < a.width) sum += w[ky * 3 + kx] * read<T>(a, n, in, y, x);
    }
  }
  ((T *)a.out)[i] = rounded(sum, T());
}

// The gradient of a depthwise convolution's input from that of its output (x), and z added where there is one. `columns` are the
// input's. One item: one value of the input.
template <typename T>
ON_DEVICE void depthwise_back(const unsigned i, const Args &a) {
  const unsigned c = i / a.columns, ix = i % a.width, iy = i / a.width % a.height;
  const unsigned plane = i / a.width / a.height;
  const T *grad = (const T *)a.x + (unsigned long long)plane * a.out_height * a.out_width;
  const float *w = (const float *)a.y + 9ull * c;
  float sum = a.z ? widened(((const T *)a.z)[i]) : 0.0f;
  for (int ky = 0; ky < 3; ky++) {
    const int y = (int)iy + a.top - ky;
    if (y < 0 || y % a.stride != 0 || y / a.stride >= a.out_height) continue;
    for (int kx = 0; kx < 3; kx++) {
      const int x = (int)ix + a.left - kx;
      if (x < 0 || x % a.stride != 0 || x / a.stride >= a.out_width) continue;
      sum += w[ky * 3 + kx] * widened(grad[(unsigned)(y / a.stride) * a.out_width + x / a.stride]);
    }
  }
  ((T *)a.out)[i] = rounded(sum, T());
}

// The gradient of a depthwise convolution's weights over one strip of its output: z is that gradient, x the input. out (f32): 9 per
// item. `columns` are the output's. One item: channel, strip.
template <typename T>
ON_DEVICE void depthwise_weights_strip(const unsigned i, const Args &a) {
  const unsigned c = i / a.strips;
  const T *grad = (const T *)a.z + (unsigned long long)c * a.columns;
  const T *in = (const T *)a.x + (unsigned long long)c * a.images * a.height * a.width;
  const Norm n = a.norm ? norm_of(a, c) : Norm{1.0f, 0.0f, 0.0f, 1.0f};
  float sums[9] = {0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f};
  for (int at = (int)(i % a.strips); at < a.columns; at += a.strips) {
    const int ox = at % a.out_width, oy = at / a.out_width % a.out_height, image = at / a.out_width / a.out_height;
    const T *plane = in + (unsigned long long)image * a.height * a.width;
    const float g = widened(grad[at]);
#pragma unroll
    for (int ky = 0; ky < 3; ky++) {
      const int y = oy * a.stride + ky - a.top;
      if (y < 0 || y >= a.height) continue;
#pragma unroll
      for (int kx = 0; kx < 3; kx++) {
        const int x = ox * a.stride + kx - a.left;
        if (x >= 0 && x < a.width) sums[ky * 3 + kx] += g * read<T>(a, n, plane, y, x);
      }
    }
  }
  float *out = (float *)a.out + 9ull * i;
  for (int k = 0; k < 9; k++) out[k] = sums[k];
}

// Sums strips of nine. One item: channel, k.
template <typename T>
ON_DEVICE void depthwise_weights(const unsigned i, const Args &a) {
  const float *strips = (const float *)a.x + 9ull * (i / 9) * a.strips + i % 9;
  float sum = 0.0f;
  for (int s = 0; s < a.strips; s++) sum += strips[9 * s];
  ((float *)a.out)[i] = sum;
}

// Sums of a gradient (x) and of its product with the normalised value over one strip of a channel. With a limit, the gradient is
// first set to zero where the activation of z, the map before the norm, is flat. out (f32): 2 per item. One item: channel, strip.
template <typename T>
ON_DEVICE void slope_strip(const unsigned i, const Args &a) {
  const unsigned c = i / a.strips;
  const Norm n = norm_of(a, c);
  T *grad = (T *)a.x + (unsigned long long)c * a.columns;
  const T *raw = (const T *)a.z + (unsigned long long)c * a.columns;
  float sum = 0.0f, products = 0.0f;
  for (int at = (int)(i % a.strips); at < a.columns; at += a.strips) {
    float g = widened(grad[at]);
    const float v = widened(raw[at]);
    if (a.limit > 0.0f) {
      const float y = v * n.scale + n.shift;
      if (!(y > 0.0f && y < a.limit)) {
        g = 0.0f;
        grad[at] = rounded(0.0f, T());
      }
    }
    sum += g;
    products += g * ((v - n.mean) * n.inverse);
  }
  put_two(i, a, sum, products);
}

// Sums strips of two: out (f32), the gradients of gamma and beta, which are what `before` wants, too: `channels` products, then as many
// sums. One item: one channel.
template <typename T>
ON_DEVICE void slope(const unsigned i, const Args &a) {
  float sum = 0.0f, products = 0.0f;
  sum_two(i, a, sum, products);
  float *out = (float *)a.out + i;
  out[0] = products;
  out[a.channels] = sum;
}

// The gradient before a batch norm from the one after it (x), the map before it (z) and its sums (y, as `slope` leaves them).
// One item: one value.
template <typename T>
ON_DEVICE void before(const unsigned i, const Args &a) {
  const unsigned c = i / a.columns;
  const Norm n = norm_of(a, c);
  const float *sums = (const float *)a.y + c;
  const float count = (float)a.columns;
  const float unit = (widened(((const T *)a.z)[i]) - n.mean) * n.inverse;
  const float g = widened(((const T *)a.x)[i]) - sums[a.channels] / count - unit * (sums[0] / count);
  ((T *)a.out)[i] = rounded(n.scale * g, T());
}

#define BOTH(name) KERNEL(name, f32) KERNEL(name, bf16)
BOTH(narrow)
BOTH(widen)
BOTH(join)
BOTH(patches)
BOTH(moments_strip)
BOTH(moments)
BOTH(activate)
BOTH(affine)
BOTH(depthwise)
BOTH(depthwise_back)
BOTH(depthwise_weights_strip)
BOTH(depthwise_weights)
BOTH(slope_strip)
BOTH(slope)
BOTH(before)
