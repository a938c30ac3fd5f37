// The two products that decoding is made of, over vectors of fp32 and bf16.
//
// A step of decoding reads every weight and the cache once and computes little with each, so a
// kernel has to read rows as they lie in memory and to do all that a row is needed for at once.
// Two products of few rows a_i with many rows b_r of memory are all there is:
//
//     dots   <a_i, b_r>            a matrix stored output-major; scores of attention
//     mix    sum_r p_ir b_r        a matrix stored input-major; values of attention
//
// Linear is dots. Attention is dots, softmax, mix. An expert is dots, silu, mix.
//
// Numbers are fp32 or bf16; sums are fp32. A bf16 vector is split into its even and its odd numbers
// (a shift and a mask), so sums of bf16 rows lie in that order until they are narrowed again.
// Every dot product adds the same numbers in the same order, whatever other rows are computed with
// it, so a row's result never depends on its neighbours. No packing: these are the weights that train.
//
// Left out: gradients, packed or quantised weights, more than one block of queries (that is prefill).

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

// ------------------------------------------------------------------------------------------ vectors
#ifdef __AVX512F__
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif
typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef uint32_t Bits __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));

struct bf16 {
  uint16_t bits;
};

// V: what one load takes; size: numbers in it; parts: fp32 vectors that it widens to.
template <class T>
struct Pack;
template <>
struct Pack<float> {
  using V = Floats;
  static constexpr int size = LANES, parts = 1;
};
template <>
struct Pack<bf16> {
  using V = Bits;
  static constexpr int size = 2 * LANES, parts = 2;
};

inline Floats all(float x) { return x - Floats{}; }

// At most n numbers from p; what lies behind them is 0, which changes no sum.
template <class T>
inline typename Pack<T>::V load(const T* p, int64_t n) {
  typename Pack<T>::V v = {};
  if (n >= Pack<T>::size)
    std::memcpy(&v, p, sizeof v);
  else
    std::memcpy(&v, p, n * sizeof(T));
  return v;
}

inline void widen(Floats v, Floats* parts) { parts[0] = v; }
inline void widen(Bits v, Floats* parts) {
  parts[0] = (Floats)(v << 16);         // even numbers
  parts[1] = (Floats)(v & 0xffff0000u);  // odd numbers
}

inline Bits rounded(Floats x) {  // to the nearest bf16, ties to even; in the upper half
  Bits u = (Bits)x;
  return u + 0x7fffu + ((u >> 16) & 1u);
}
inline void narrow(const Floats* parts, Floats& v) { v = parts[0]; }
inline void narrow(const Floats* parts, Bits& v) { v = (rounded(parts[0]) >> 16) | (rounded(parts[1]) & 0xffff0000u); }

template <class T>
inline void store(const Floats* parts, T* p, int64_t n) {
  typename Pack<T>::V v;
  narrow(parts, v);
  if (n >= Pack<T>::size)
    std::memcpy(p, &v, sizeof v);
  else
    std::memcpy(p, &v, n * sizeof(T));
}

inline Floats multiply_add(Floats sum, Floats a, Floats b) { return sum + a * b; }
inline Floats multiply_add(Floats sum, Bits a, Bits b) {
#ifdef __AVX512BF16__
  return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
  Floats x[2], y[2];
  widen(a, x), widen(b, y);
  return sum + x[0] * y[0] + x[1] * y[1];
#endif
}

// e^x by 2^n times a polynomial on [-ln2/2, ln2/2] (Cephes' coefficients); 0 and infinity at the ends.
inline Floats exponential(Floats x) {
  x = x > 88.0f ? all(88.0f) : x;
  x = x < -87.0f ? all(-87.0f) : x;
  Floats n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;  // 1.5 x 2^23 rounds to a whole number
  Floats r = x - n * 0.693359375f + n * 2.12194440e-4f;
  Floats p = all(1.9875691500e-4f);
  for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f}) p = p * r + c;
  Floats y = p * r * r + r + 1.0f;
  return y * (Floats)((__builtin_convertvector(n, Ints) + 127) << 23);
}

// One level of the tree below: lanes with bit S clear add pairs of a, lanes with it set pairs of b.
template <int S, size_t... I>
inline Floats merge(Floats a, Floats b, std::index_sequence<I...>) {
  return __builtin_shufflevector(a, b, int(I & S ? I + LANES : I)...) +
         __builtin_shufflevector(a, b, int(I & S ? (I ^ S) + LANES : (I ^ S))...);
}

// Lane i of the result is the sum of v[i]'s lanes: LANES sums for the price of about three.
template <int S = 1>
inline Floats sums(Floats* v) {
  if constexpr (S == LANES) {
    return v[0];
  } else {
    for (int i = 0; i < LANES / S / 2; i++) v[i] = merge<S>(v[2 * i], v[2 * i + 1], std::make_index_sequence<LANES>{});
    return sums<2 * S>(v);
  }
}

inline float sum(Floats v) {
  float total = 0;
  for (int i = 0; i < LANES; i++) total += v[i];
  return total;
}

// --------------------------------------------------------------------------------- the two products
constexpr int64_t BLOCK = 16;  // rows of b that dots takes at a time
constexpr int64_t CHUNK = 32;  // the same for mix: they stay in the first cache while all p use them

// Calls work(constant M, i) so that M <= MOST at a time cover 0..count.
template <int MOST, class Work>
inline void tiles(int64_t count, Work work) {
  int64_t i = 0;
  for (; i + MOST <= count; i += MOST) work(std::integral_constant<int, MOST>{}, i);
  if constexpr (MOST > 4)
    if (i + 4 <= count) work(std::integral_constant<int, 4>{}, i), i += 4;
  if (i + 2 <= count) work(std::integral_constant<int, 2>{}, i), i += 2;
  if (i < count) work(std::integral_constant<int, 1>{}, i);
}

// M rows of a with LANES / M rows of b: lane m * (LANES / M) + r is <a_m, b_r>.
template <class T, int M>
inline Floats tile_dots(const T* const* a, const T* b, int64_t stride, int64_t rows, int64_t width) {
  constexpr int R = LANES / M, size = Pack<T>::size;
  const T* row[R];
  for (int r = 0; r < R; r++) row[r] = b + (r < rows ? r : rows - 1) * stride;
  Floats total[LANES] = {};
  auto along = [&](auto step) {
    int64_t k = 0;
    for (; k + size <= width; k += size) step(k, size);
    if (k < width) step(k, width - k);
  };
  // Many rows of a, all of b side by side, so that each load of a serves them all; one alone, row by row, because memory
  // answers one stream of addresses half as fast again as sixteen.
  if constexpr (M == 1)
    for (int r = 0; r < R; r++)
      along([&](int64_t k, int64_t n) { total[r] = multiply_add(total[r], load(a[0] + k, n), load(row[r] + k, n)); });
  else
    along([&](int64_t k, int64_t n) {
      typename Pack<T>::V left[M];
      for (int m = 0; m < M; m++) left[m] = load(a[m] + k, n);
      for (int r = 0; r < R; r++) {
        auto right = load(row[r] + k, n);
        for (int m = 0; m < M; m++) total[m * R + r] = multiply_add(total[m * R + r], left[m], right);
      }
    });
  return sums(total);
}

// out[i * out_stride + r] = <a_i, b_r> for r < rows <= BLOCK; out is written up to BLOCK numbers a row.
template <class T>
void dots(const T* const* a, int64_t count, const T* b, int64_t stride, int64_t rows, int64_t width, float* out,
          int64_t out_stride) {
  tiles<4>(count, [&](auto tile, int64_t i) {  // 4 x 4 needs the fewest loads
    constexpr int M = decltype(tile)::value, R = LANES / M;
    for (int64_t r = 0; r < rows; r += R) {
      Floats done = tile_dots<T, M>(a + i, b + r * stride, stride, std::min<int64_t>(R, rows - r), width);
      for (int m = 0; m < M; m++) std::memcpy(out + (i + m) * out_stride + r, (float*)&done + m * R, R * sizeof(float));
    }
  });
}

// Asks for `rows` rows of b: the memory answers while something else is computed.
template <class T>
inline void ahead(const T* b, int64_t stride, int64_t rows, int64_t width) {
  for (int64_t r = 0; r < rows; r++)
    for (int64_t k = 0; k < width; k += int64_t(64 / sizeof(T))) __builtin_prefetch(b + r * stride + k);
}

// into[i] += sum_r p[i][r] b_r, where into has whole packs in the order of their parts (see `finish`).
template <class T>
void mix(const float* const* p, int64_t count, const T* b, int64_t stride, int64_t rows, int64_t width,
         float* const* into) {
  constexpr int size = Pack<T>::size, parts = Pack<T>::parts;
  for (int64_t start = 0; start < rows; start += CHUNK) {
    int64_t end = std::min(rows, start + CHUNK);
    ahead(b + end * stride, stride, std::min(CHUNK, rows - end), width);
    for (int64_t k = 0; k < width; k += size) {
      tiles<8>(count, [&](auto tile, int64_t i) {
        constexpr int M = decltype(tile)::value;
        Floats total[M][parts], wide[parts];
        for (int m = 0; m < M; m++) std::memcpy(total[m], into[i + m] + k, sizeof total[m]);
        auto add = [&](auto n) {
          for (int64_t r = start; r < end; r++) {
            widen(load(b + r * stride + k, n), wide);
            for (int m = 0; m < M; m++)
              for (int j = 0; j < parts; j++) total[m][j] += p[i + m][r] * wide[j];
          }
        };
        if (k + size <= width)
          add(std::integral_constant<int64_t, size>{});  // known to the compiler: one plain load
        else
          add(width - k);
        for (int m = 0; m < M; m++) std::memcpy(into[i + m] + k, total[m], sizeof total[m]);
      });
    }
  }
}

inline int64_t whole(int64_t n, int64_t size) { return (n + size - 1) / size * size; }

template <class T>
void finish(const float* sums, T* out, int64_t width) {
  constexpr int size = Pack<T>::size;
  for (int64_t k = 0; k < width; k += size) {
    Floats parts[Pack<T>::parts];
    std::memcpy(parts, sums + k, sizeof parts);
    store(parts, out + k, width - k);
  }
}

inline void put(float x, float* p) { *p = x; }
inline void put(float x, bf16* p) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  p->bits = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
}
inline float get(const float* p) { return *p; }
inline float get(const bf16* p) {
  uint32_t u = uint32_t(p->bits) << 16;
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}
