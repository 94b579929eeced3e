// The work of a training step on a CPU that is not a product, and the products of a few rows that generation is made of. Each function
// has a plain-torch twin in kernels.py, which is what runs where no compiler is found, and which the tests hold it against. Rows are
// split over threads; no result depends on the split.
//
// B tokens, S = d_sae, W a row's width, n chosen (token, latent) pairs.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <thread>
#include <vector>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {

typedef int64_t i64;
typedef uint16_t bf16;
typedef float f32x16 __attribute__((vector_size(64), aligned(4)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32), aligned(2)));

constexpr int LANES = 16, UNROLL = 16, PANEL = LANES * UNROLL;  // columns summed in registers at a time
constexpr i64 LEAST_WORK = 1 << 15;                            // multiply-adds that are worth a thread

inline float widened(float x) { return x; }
inline float widened(bf16 x) {
  uint32_t bits = uint32_t(x) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}
inline f32x16 load(const float* p) { return *reinterpret_cast<const f32x16*>(p); }
inline void store(float* p, f32x16 v) { *reinterpret_cast<f32x16*>(p) = v; }
inline f32x16 load(const bf16* p) {
  return (f32x16)(__builtin_convertvector(*reinterpret_cast<const u16x16*>(p), u32x16) << 16);
}
inline f32x16 all(float x) { return x - f32x16{}; }
inline f32x16 where(i32x16 mask, f32x16 a, f32x16 b) { return (f32x16)((mask & (i32x16)a) | (~mask & (i32x16)b)); }

// v as memory of a type holds it: a bfloat16 is the upper half, the nearest one, of two the even one; NaN stays NaN.
inline f32x16 rounded(f32x16 v, const float*) { return v; }
inline f32x16 rounded(f32x16 v, const bf16*) {
  u32x16 bits = (u32x16)v;
  u32x16 nearest = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000u;
  return where(v == v, (f32x16)nearest, (f32x16)(bits | 0x400000));
}
inline void store(bf16* p, f32x16 v) {
  *reinterpret_cast<u16x16*>(p) = __builtin_convertvector((u32x16)rounded(v, p) >> 16, u16x16);
}

// A row of n entries, LANES at a time: f(first, how many), of which the last may be fewer.
template <class F>
inline void along(i64 n, F f) {
  i64 i = 0;
  for (; i + LANES <= n; i += LANES) f(i, i64(LANES));
  if (i < n) f(i, n - i);
}
template <class T>
inline f32x16 load(const T* p, i64 n) {
  if (n == LANES) return load(p);
  T padded[LANES] = {};
  std::memcpy(padded, p, n * sizeof(T));
  return load(padded);
}
template <class T>
inline void store(T* p, f32x16 v, i64 n) {
  if (n == LANES) return store(p, v);
  T padded[LANES];
  store(padded, v);
  std::memcpy(p, padded, n * sizeof(T));
}
// TWO vectors at a time of memory that is not cut into lanes anywhere: of bfloat16 the even entries and the odd ones, which costs a shift
// and a mask where in their order they would have to be moved apart. So only sums, and products with what was loaded alike.
constexpr int TWO = 2 * LANES;
struct Two { f32x16 a, b; };
inline Two load_two(const float* p) { return {load(p), load(p + LANES)}; }
inline Two load_two(const bf16* p) {
  u32x16 both;
  std::memcpy(&both, p, sizeof both);
  return {(f32x16)(both << 16), (f32x16)(both & 0xffff0000u)};
}
inline void store_two(float* p, Two v) { store(p, v.a), store(p + LANES, v.b); }
inline void store_two(bf16* p, Two v) {
  u32x16 both = (u32x16)rounded(v.a, p) >> 16 | (u32x16)rounded(v.b, p);
  std::memcpy(p, &both, sizeof both);
}
template <class T>
inline Two load_two(const T* p, i64 n) {
  if (n == TWO) return load_two(p);
  T padded[TWO] = {};
  std::memcpy(padded, p, n * sizeof(T));
  return load_two(padded);
}
template <class T>
inline void store_two(T* p, Two v, i64 n) {
  if (n == TWO) return store_two(p, v);
  T padded[TWO];
  store_two(padded, v);
  std::memcpy(p, padded, n * sizeof(T));
}
// Where entry i of TWO lies when they are loaded.
inline int place(int i, const float*) { return i; }
inline int place(int i, const bf16*) { return i / 2 + i % 2 * LANES; }
template <class F>
inline void along_two(i64 n, F f) {
  for (i64 i = 0; i < n; i += TWO) f(i, std::min<i64>(TWO, n - i));
}
inline i32x16 first(i64 n) {
  return i32x16{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15} < int32_t(n);
}

// f(begin, end) over parts of [0, n), one part a thread: torch's own threads where they are OpenMP's, which otherwise spin
// for the next product on the processors that are wanted here.
template <class F>
void split(i64 n, i64 work, int threads, F f) {
  i64 parts = std::min<i64>({threads, n, std::max<i64>(1, work / LEAST_WORK)});
  if (parts <= 1) return f(i64(0), n);
#ifdef _OPENMP
#pragma omp parallel for num_threads(parts) schedule(static, 1)
  for (i64 i = 0; i < parts; ++i) f(n * i / parts, n * (i + 1) / parts);
#else
  std::vector<std::thread> others;
  for (i64 i = 1; i < parts; ++i) others.emplace_back(f, n * i / parts, n * (i + 1) / parts);
  f(i64(0), n / parts);
  for (auto& other : others) other.join();
#endif
}

// Like split, in parts that begin where a whole TWO does, for work that waits for memory: a thread is worth more of it.
template <class F>
void split_two(i64 n, i64 loads, int threads, F f) {
  split((n + TWO - 1) / TWO, loads / 8, threads, [=](i64 begin, i64 end) { f(begin * TWO, std::min(n, end * TWO)); });
}

// Like split, in parts of equal numbers of pairs where segment j holds pairs starts[j] … starts[j + 1].
template <class F>
void split_segments(const i64* starts, i64 m, i64 width, int threads, F f) {
  i64 n = starts[m] - starts[0];
  auto at = [&](i64 pair) { return std::lower_bound(starts, starts + m, pair) - starts; };
  i64 parts = std::max<i64>(1, std::min<i64>({threads, m, n * width / LEAST_WORK}));
  split(parts, parts * LEAST_WORK, threads, [&](i64 begin, i64 end) {
    for (i64 part = begin; part < end; ++part)
      f(part ? at(starts[0] + n * part / parts) : 0, part + 1 < parts ? at(starts[0] + n * (part + 1) / parts) : m);
  });
}

// The float of a key: unsigned integers in the order of the floats.
inline float unkey(uint32_t k) {
  uint32_t bits = k & 0x80000000u ? k & 0x7fffffffu : ~k;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

// The k-th largest of n ≥ k values: bit by bit, the largest key that k values reach. NaN counts as below everything.
// Fewer bits give a bound that at least k values reach.
float kth_largest(const float* values, i64 n, i64 k, int bits = 32) {
  uint32_t found = 0;
  for (int bit = 31; bit >= 32 - bits; --bit) {
    uint32_t tried = found | (1u << bit);
    float bound = unkey(tried);
    if (std::isnan(bound)) continue;  // keys beyond the infinities
    int32_t reached = 0;
    for (i64 i = 0; i < n; ++i) reached += values[i] >= bound;
    if (reached >= k) found = tried;
  }
  float bound = unkey(found);
  return std::isnan(bound) ? -std::numeric_limits<float>::infinity() : bound;
}

// Where p + bias reaches (or exceeds) a bound: positions to `where`, values to `values` → how many.
struct Reach { static bool holds(float v, float b) { return v >= b; } };
struct Exceed { static bool holds(float v, float b) { return v > b; } };

template <class Test, class T, bool PER_LATENT>
i64 collect(const T* p, const float* bias, const float* bounds, i64 S, int32_t* where, float* values) {
  i64 count = 0, i = 0;
#ifdef __AVX512F__
  constexpr int op = std::is_same<Test, Reach>::value ? _CMP_GE_OQ : _CMP_GT_OQ;
  __m512 bound = _mm512_set1_ps(bounds[0]);
  __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (; i + LANES <= S; i += LANES) {
    __m512 v = (__m512)(load(p + i) + load(bias + i));
    if (PER_LATENT) bound = _mm512_loadu_ps(bounds + i);
    __mmask16 mask = _mm512_cmp_ps_mask(v, bound, op);
    if (mask == 0) continue;
    if (where) {
      // Compressed in a register and stored whole, past the end too: storing what is compressed is slow on some processors.
      __m512i at = _mm512_add_epi32(lanes, _mm512_set1_epi32(int(i)));
      _mm512_storeu_si512(where + count, _mm512_maskz_compress_epi32(mask, at));
      _mm512_storeu_ps(values + count, _mm512_maskz_compress_ps(mask, v));
    }
    count += __builtin_popcount(mask);
  }
#endif
  for (; i < S; ++i) {
    float v = widened(p[i]) + bias[i];
    if (!Test::holds(v, bounds[PER_LATENT ? i : 0])) continue;
    if (where) where[count] = int32_t(i), values[count] = v;
    ++count;
  }
  return count;
}

// The k largest of p + bias of each row, by ascending latent; of equals the lower latent.
//
// A bound first: of some interleaved groups take the maxima; k of them reach their k-th largest, so at least k entries do.
// What reaches it is little more than k, and is then cut exactly.
template <class T>
void top_k(const T* p, i64 stride, const float* bias, i64 B, i64 S, i64 k, float* values, i64* latents, int threads) {
  i64 groups = 256;
  while (groups < 4 * k) groups *= 2;
  split(B, B * S, threads, [=](i64 begin, i64 end) {
    std::vector<float> found(S + LANES), maxima(groups);
    std::vector<int32_t> where(S + LANES);
    for (i64 b = begin; b < end; ++b) {
      const T* row = p + b * stride;
      float bound = -std::numeric_limits<float>::infinity();
      if (S >= 2 * groups) {
        std::fill(maxima.begin(), maxima.end(), bound);
        for (i64 i = 0; i + groups <= S; i += groups)
          for (i64 g = 0; g < groups; g += LANES) {
            f32x16 v = load(row + i + g) + load(bias + i + g), most = load(maxima.data() + g);
            store(maxima.data() + g, v > most ? v : most);
          }
        bound = kth_largest(maxima.data(), groups, k, 16);
      }
      i64 count = collect<Reach, T, false>(row, bias, &bound, S, where.data(), found.data());
      float* out = values + b * k;
      i64* out_latents = latents + b * k;
      if (count < k) {  // NaN: the loss will say so
        for (i64 j = 0; j < k; ++j) out_latents[j] = j, out[j] = widened(row[j]) + bias[j];
        continue;
      }
      float last = kth_largest(found.data(), count, k);
      i64 above = 0, at = 0;
      for (i64 j = 0; j < count; ++j) above += found[j] > last;
      i64 ties = k - above;
      for (i64 j = 0; j < count && at < k; ++j)
        if (found[j] > last || (found[j] == last && ties-- > 0)) out[at] = found[j], out_latents[at++] = where[j];
    }
  });
}

// How many entries of p + bias exceed their latent's bound, row by row; then, in a second call, which and what.
template <class T>
void above(const T* p, i64 stride, const float* bias, const float* bounds, i64 B, i64 S, i64* counts,
           const i64* starts, float* values, i64* latents, int threads) {
  split(B, B * S, threads, [=](i64 begin, i64 end) {
    std::vector<float> found(starts ? S + LANES : 0);
    std::vector<int32_t> where(starts ? S + LANES : 0);
    for (i64 b = begin; b < end; ++b) {
      i64 n = collect<Exceed, T, true>(p + b * stride, bias, bounds, S, starts ? where.data() : nullptr, found.data());
      if (!starts) { counts[b] = n; continue; }
      std::copy(found.data(), found.data() + n, values + starts[b]);
      std::copy(where.data(), where.data() + n, latents + starts[b]);
    }
  });
}

// row = Σ weight(i) · table[index[i]] over the pairs i from begin to end.
template <class F>
inline void weighted_rows(const i64* index, F weight_of, i64 begin, i64 end, const float* table, i64 W, float* row) {
  i64 column = 0;
  for (; column + PANEL <= W; column += PANEL) {
    f32x16 sum[UNROLL] = {};
    for (i64 i = begin; i < end; ++i) {
      const float* from = table + index[i] * W + column;
      f32x16 weight = all(weight_of(i));
#pragma GCC unroll 16
      for (int u = 0; u < UNROLL; ++u) sum[u] += weight * load(from + u * LANES);
    }
#pragma GCC unroll 16
    for (int u = 0; u < UNROLL; ++u) store(row + column + u * LANES, sum[u]);
  }
  for (; column + LANES <= W; column += LANES) {
    f32x16 sum = {};
    for (i64 i = begin; i < end; ++i) sum += weight_of(i) * load(table + index[i] * W + column);
    store(row + column, sum);
  }
  for (; column < W; ++column) {
    float sum = 0;
    for (i64 i = begin; i < end; ++i) sum += weight_of(i) * table[index[i] * W + column];
    row[column] = sum;
  }
}

// The sum of the lanes, halves onto halves.
inline float total(f32x16 v) {
  float lanes[LANES];
  store(lanes, v);
  for (int half = LANES / 2; half > 0; half /= 2)
    for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  return lanes[0];
}

inline float dot(const float* a, const float* b, i64 W) {
  f32x16 sums[4] = {};
  i64 column = 0;
  for (; column + 4 * LANES <= W; column += 4 * LANES)
    for (int u = 0; u < 4; ++u) sums[u] += load(a + column + u * LANES) * load(b + column + u * LANES);
  for (; column + LANES <= W; column += LANES) sums[0] += load(a + column) * load(b + column);
  float sum = total((sums[0] + sums[1]) + (sums[2] + sums[3]));
  for (; column < W; ++column) sum += a[column] * b[column];
  return sum;
}

// out[i] = row · table[index[i]] of the pairs i from begin to end, a few at a time, which share the loads of the row.
void dots(const i64* index, i64 begin, i64 end, const float* table, i64 W, const float* row, float* out) {
  constexpr int SOME = 4;
  i64 i = begin;
  for (; i + SOME <= end; i += SOME) {
    const float* from[SOME];
    f32x16 sums[SOME] = {};
    for (int u = 0; u < SOME; ++u) from[u] = table + index[i + u] * W;
    i64 column = 0;
    for (; column + LANES <= W; column += LANES) {
      f32x16 here = load(row + column);
#pragma GCC unroll 4
      for (int u = 0; u < SOME; ++u) sums[u] += here * load(from[u] + column);
    }
    for (int u = 0; u < SOME; ++u) {
      float sum = total(sums[u]);
      for (i64 rest = column; rest < W; ++rest) sum += row[rest] * from[u][rest];
      out[i + u] = sum;
    }
  }
  for (; i < end; ++i) out[i] = dot(row, table + index[i] * W, W);
}

inline float total(i32x16 v) {
  int64_t sum = 0;
  for (int lane = 0; lane < LANES; ++lane) sum += v[lane];
  return float(sum);
}

// f = v = p + bias where that exceeds the threshold, else 0, in the place of p; a zero's sign says that v was less than `half`
// below. Of each latent the sum of f and how many are positive.
template <class T>
void jump(T* p, const float* bias, const float* thresholds, float half, i64 S, i64 B, float* sums, float* counts,
          int threads) {
  split(S, S * B, threads, [=](i64 begin, i64 end) {
    for (i64 s = begin; s < end; ++s) {
      T* row = p + s * B;
      f32x16 shift = all(bias[s]), threshold = all(thresholds[s]), sum = {};
      i32x16 count = {};
      along(B, [&](i64 i, i64 n) {
        f32x16 v = load(row + i, n) + shift;
        i32x16 below = v <= threshold, near = below & (v > threshold - half);
        f32x16 f = rounded(where(below, where(near, all(-0.0f), all(0)), v), row);
        store(row + i, f, n);
        i32x16 fires = (f > 0) & first(n);
        sum += where(fires, f, all(0));
        count -= fires;
      });
      sums[s] = total(sum), counts[s] = total(count);
    }
  });
}

// out = (g + lift) where f fires, and theta · felt · g more where it is near its threshold; of each latent the sums of out and
// of g where it is near, and how often it is.
template <class T>
void jump_back(const T* f, const T* g, const float* thresholds, const float* lift, float half, float felt, i64 S, i64 B,
               T* out, float* sums, float* near_sums, float* near_counts, int threads) {
  split(S, S * B, threads, [=](i64 begin, i64 end) {
    for (i64 s = begin; s < end; ++s) {
      const T *values = f + s * B, *from = g + s * B;
      T* to = out + s * B;
      f32x16 threshold = all(thresholds[s]), more = all(lift[s]), slope = all(thresholds[s] * felt), sum = {}, near_sum = {};
      i32x16 count = {};
      along(B, [&](i64 i, i64 n) {
        f32x16 v = load(values + i, n), gradient = load(from + i, n);
        i32x16 fires = (v > 0) & first(n);
        i32x16 near = (fires & (v - threshold < half)) | ((i32x16)v == INT32_MIN);
        f32x16 there = where(near, gradient, all(0));
        f32x16 r = where(fires, gradient + more, all(0)) + slope * there;
        store(to + i, r, n);
        sum += r, near_sum += there, count -= near;
      });
      sums[s] = total(sum), near_sums[s] = total(near_sum), near_counts[s] = total(count);
    }
  });
}

// gate = max(p + bias, 0), in the place of p, and f = max(a gate + b, 0) where gate > 0; of each latent the sum of the gate and
// how many f are positive.
template <class T>
void gate(T* p, const float* bias, const float* a, const float* b, i64 S, i64 B, T* f, float* sums, float* counts,
          int threads) {
  split(S, S * B, threads, [=](i64 begin, i64 end) {
    for (i64 s = begin; s < end; ++s) {
      T *gates = p + s * B, *values = f + s * B;
      f32x16 shift = all(bias[s]), factor = all(a[s]), more = all(b[s]), sum = {};
      i32x16 count = {};
      along(B, [&](i64 i, i64 n) {
        f32x16 v = load(gates + i, n) + shift;
        f32x16 opened = rounded(where(v <= 0, all(0), v), gates);
        f32x16 size = factor * opened + more;
        f32x16 found = rounded(where((opened <= 0) | (size <= 0), all(0), size), values);
        store(gates + i, opened, n);
        store(values + i, found, n);
        i32x16 open = (opened > 0) & first(n);
        sum += where(open, opened, all(0));
        count -= (found > 0) & first(n);
      });
      sums[s] = total(sum), counts[s] = total(count);
    }
  });
}

// out = g_gate + lift where the gate is open, and a g_f more where f = a gate + b is positive too; of each latent the sums of
// out, and of g_f gate and g_f there.
template <class T>
void gate_back(const T* gates, const T* g_gate, const T* g_f, const float* a, const float* b, const float* lift, i64 S, i64 B,
               T* out, float* sums, float* a_sums, float* b_sums, int threads) {
  split(S, S * B, threads, [=](i64 begin, i64 end) {
    for (i64 s = begin; s < end; ++s) {
      i64 at = s * B;
      f32x16 factor = all(a[s]), more = all(b[s]), up = all(lift[s]), sum = {}, a_sum = {}, b_sum = {};
      along(B, [&](i64 i, i64 n) {
        f32x16 v = load(gates + at + i, n);
        i32x16 open = (v > 0) & first(n);
        f32x16 h = where(open & (factor * v + more > 0), load(g_f + at + i, n), all(0));
        f32x16 r = where(open, load(g_gate + at + i, n) + up, all(0)) + factor * h;
        store(out + at + i, r, n);
        sum += r, a_sum += h * v, b_sum += h;
      });
      sums[s] = total(sum), a_sums[s] = total(a_sum), b_sums[s] = total(b_sum);
    }
  });
}

// Products of M rows, few of them, with weights that have to come from memory, once for all rows. A row's sums are taken in one order
// however many rows there are, so that it comes out alike among others and alone.

constexpr int SOME_ROWS = 8, SOME_TOKENS = 4;  // of the weights and of x, gone through together

// Into sums [M, TWO], in the order of load_two, what x [M, padded], which is in that order, gives with R rows of the weights.
template <int R, int M, class T>
inline void inner(const float* x, i64 padded, const T* w, i64 D, float* sums, int at) {
  f32x16 found[R][M] = {};
  auto add = [&](i64 i, i64 n) __attribute__((always_inline)) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      Two here = load_two(w + r * D + i, n);
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) {
        found[r][m] += here.a * load(x + m * padded + i);
        found[r][m] += here.b * load(x + m * padded + i + LANES);
      }
    }
  };
  i64 i = 0;
  for (; i + TWO <= D; i += TWO) add(i, TWO);
  if (i < D) add(i, D - i);
  for (int r = 0; r < R; ++r)
    for (int m = 0; m < M; ++m) sums[m * TWO + place(at + r, w)] = total(found[r][m]);
}
template <int R, class T>
inline void inner(const float* x, i64 M, i64 padded, const T* w, i64 D, float* sums, int at) {
  for (; M >= SOME_TOKENS; M -= SOME_TOKENS, x += SOME_TOKENS * padded, sums += SOME_TOKENS * TWO)
    inner<R, SOME_TOKENS>(x, padded, w, D, sums, at);
  if (M == 3) inner<R, 3>(x, padded, w, D, sums, at);
  if (M == 2) inner<R, 2>(x, padded, w, D, sums, at);
  if (M == 1) inner<R, 1>(x, padded, w, D, sums, at);
}

// Onto sums [M, stride], in the order of load_two, R rows of the weights from a column on, n columns long, each times its entry of x [M, D].
template <int R, class T>
inline void outer(const float* x, i64 M, i64 D, const T* w, i64 S, i64 n, float* sums, i64 stride) {
  along_two(n, [=](i64 column, i64 many) __attribute__((always_inline)) {
    Two here[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) here[r] = load_two(w + r * S + column, many);
    for (i64 m = 0; m < M; ++m) {
      float* row = sums + m * stride + column;
      Two sum = {load(row), load(row + LANES)};
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        f32x16 times = all(x[m * D + r]);
        sum.a += times * here[r].a, sum.b += times * here[r].b;
      }
      store(row, sum.a), store(row + LANES, sum.b);
    }
  });
}

// out [M, S], n columns of it: sums, in the order of load_two, and the bias, rounded once.
template <class T>
inline void told(const float* sums, i64 M, i64 stride, const T* bias, i64 n, T* out, i64 S) {
  for (i64 m = 0; m < M; ++m)
    along_two(n, [=](i64 column, i64 many) {
      const float* row = sums + m * stride + column;
      Two sum = {load(row), load(row + LANES)}, more = bias ? load_two(bias + column, many) : Two{};
      store_two(out + m * S + column, Two{sum.a + more.a, sum.b + more.b}, many);
    });
}

// out = x wᵀ + bias: x [M, D], w [S, D], bias [S] or none.
template <class T>
void linear(const T* x, i64 M, i64 D, const T* w, i64 S, const T* bias, T* out, int threads) {
  i64 padded = (D + TWO - 1) / TWO * TWO;
  std::vector<float> wide(M * padded);
  for (i64 m = 0; m < M; ++m)
    along_two(D, [&](i64 i, i64 n) { store_two(wide.data() + m * padded + i, load_two(x + m * D + i, n)); });
  split_two(S, D * S, threads, [&](i64 begin, i64 end) {
    std::vector<float> sums(M * TWO);
    along_two(end - begin, [&](i64 from, i64 n) {
      const T* rows = w + (begin + from) * D;
      int r = 0;
      for (; r + SOME_ROWS <= n; r += SOME_ROWS) inner<SOME_ROWS>(wide.data(), M, padded, rows + r * D, D, sums.data(), r);
      for (; r < n; ++r) inner<1>(wide.data(), M, padded, rows + r * D, D, sums.data(), r);
      told(sums.data(), M, TWO, bias ? bias + begin + from : nullptr, n, out + begin + from, S);
    });
  });
}

// out = x w + bias: x [M, D], w [D, S], bias [S] or none.
template <class T>
void conv1d(const T* x, i64 M, i64 D, const T* w, i64 S, const T* bias, T* out, int threads) {
  std::vector<float> wide(M * D);
  for (i64 i = 0; i < M * D; ++i) wide[i] = widened(x[i]);
  split_two(S, D * S, threads, [&](i64 begin, i64 end) {
    i64 n = end - begin, stride = (n + TWO - 1) / TWO * TWO, d = 0;
    std::vector<float> sums(M * stride);
    for (; d + SOME_ROWS <= D; d += SOME_ROWS)
      outer<SOME_ROWS>(wide.data() + d, M, D, w + d * S + begin, S, n, sums.data(), stride);
    for (; d < D; ++d) outer<1>(wide.data() + d, M, D, w + d * S + begin, S, n, sums.data(), stride);
    told(sums.data(), M, stride, bias ? bias + begin : nullptr, n, out + begin, S);
  });
}

}  // namespace

extern "C" {

void top_k_f32(const float* p, i64 stride, const float* bias, i64 B, i64 S, i64 k, float* values, i64* latents, int threads) {
  top_k(p, stride, bias, B, S, k, values, latents, threads);
}
void top_k_bf16(const bf16* p, i64 stride, const float* bias, i64 B, i64 S, i64 k, float* values, i64* latents, int threads) {
  top_k(p, stride, bias, B, S, k, values, latents, threads);
}
void above_f32(const float* p, i64 stride, const float* bias, const float* bounds, i64 B, i64 S, i64* counts,
               const i64* starts, float* values, i64* latents, int threads) {
  above(p, stride, bias, bounds, B, S, counts, starts, values, latents, threads);
}
void above_bf16(const bf16* p, i64 stride, const float* bias, const float* bounds, i64 B, i64 S, i64* counts,
                const i64* starts, float* values, i64* latents, int threads) {
  above(p, stride, bias, bounds, B, S, counts, starts, values, latents, threads);
}
void jump_f32(float* p, const float* bias, const float* thresholds, float half, i64 S, i64 B, float* sums, float* counts,
              int threads) {
  jump(p, bias, thresholds, half, S, B, sums, counts, threads);
}
void jump_back_f32(const float* f, const float* g, const float* thresholds, const float* lift, float half, float felt, i64 S,
                   i64 B, float* out, float* sums, float* near_sums, float* near_counts, int threads) {
  jump_back(f, g, thresholds, lift, half, felt, S, B, out, sums, near_sums, near_counts, threads);
}
void gate_f32(float* p, const float* bias, const float* a, const float* b, i64 S, i64 B, float* f, float* sums, float* counts,
              int threads) {
  gate(p, bias, a, b, S, B, f, sums, counts, threads);
}
void gate_back_f32(const float* gates, const float* g_gate, const float* g_f, const float* a, const float* b, const float* lift,
                   i64 S, i64 B, float* out, float* sums, float* a_sums, float* b_sums, int threads) {
  gate_back(gates, g_gate, g_f, a, b, lift, S, B, out, sums, a_sums, b_sums, threads);
}
void jump_bf16(bf16* p, const float* bias, const float* thresholds, float half, i64 S, i64 B, float* sums, float* counts,
              int threads) {
  jump(p, bias, thresholds, half, S, B, sums, counts, threads);
}
void jump_back_bf16(const bf16* f, const bf16* g, const float* thresholds, const float* lift, float half, float felt, i64 S,
                   i64 B, bf16* out, float* sums, float* near_sums, float* near_counts, int threads) {
  jump_back(f, g, thresholds, lift, half, felt, S, B, out, sums, near_sums, near_counts, threads);
}
void gate_bf16(bf16* p, const float* bias, const float* a, const float* b, i64 S, i64 B, bf16* f, float* sums, float* counts,
              int threads) {
  gate(p, bias, a, b, S, B, f, sums, counts, threads);
}
void gate_back_bf16(const bf16* gates, const bf16* g_gate, const bf16* g_f, const float* a, const float* b, const float* lift,
                   i64 S, i64 B, bf16* out, float* sums, float* a_sums, float* b_sums, int threads) {
  gate_back(gates, g_gate, g_f, a, b, lift, S, B, out, sums, a_sums, b_sums, threads);
}
void linear_f32(const float* x, i64 M, i64 D, const float* w, i64 S, const float* bias, float* out, int threads) {
  linear(x, M, D, w, S, bias, out, threads);
}
void linear_bf16(const bf16* x, i64 M, i64 D, const bf16* w, i64 S, const bf16* bias, bf16* out, int threads) {
  linear(x, M, D, w, S, bias, out, threads);
}
void conv1d_f32(const float* x, i64 M, i64 D, const float* w, i64 S, const float* bias, float* out, int threads) {
  conv1d(x, M, D, w, S, bias, out, threads);
}
void conv1d_bf16(const bf16* x, i64 M, i64 D, const bf16* w, i64 S, const bf16* bias, bf16* out, int threads) {
  conv1d(x, M, D, w, S, bias, out, threads);
}
// out[j] = Σ over the pairs i of segment j of weights[i], or weights[order[i]], · table[index[i]].
void segment_sum(const i64* index, const float* weights, const i64* order, const i64* starts, i64 m, const float* table,
                 i64 W, float* out, int threads) {
  split_segments(starts, m, W, threads, [=](i64 begin, i64 end) {
    for (i64 j = begin; j < end; ++j) {
      float* row = out + j * W;
      if (order)
        weighted_rows(index, [=](i64 i) { return weights[order[i]]; }, starts[j], starts[j + 1], table, W, row);
      else
        weighted_rows(index, [=](i64 i) { return weights[i]; }, starts[j], starts[j + 1], table, W, row);
    }
  });
}

// out[j] = Σ over the pairs i of segment j of weights[order[i]].
void segment_total(const float* weights, const i64* order, const i64* starts, i64 m, float* out, int threads) {
  split_segments(starts, m, 1, threads, [=](i64 begin, i64 end) {
    for (i64 j = begin; j < end; ++j) {
      float sum = 0;
      for (i64 i = starts[j]; i < starts[j + 1]; ++i) sum += weights[order[i]];
      out[j] = sum;
    }
  });
}

// out[i] = a[t] · b[index[i]] for the pairs i of each token t.
void pair_dots(const i64* index, const i64* starts, i64 B, const float* a, const float* b, i64 W, float* out, int threads) {
  split_segments(starts, B, W, threads, [=](i64 begin, i64 end) {
    for (i64 t = begin; t < end; ++t)
      dots(index, starts[t], starts[t + 1], b, W, a + t * W, out);
  });
}

// error[t] = rest[t] − Σ weights[i] · table[index[i]], its square sum, and its dot with each of those rows, which are then
// still in cache.
void decode_error(const i64* index, const float* weights, const i64* starts, i64 B, const float* table, i64 W,
                  const float* rest, float* error, float* squares, float* products, int threads) {
  split_segments(starts, B, 2 * W, threads, [=](i64 begin, i64 end) {
    for (i64 t = begin; t < end; ++t) {
      float* row = error + t * W;
      weighted_rows(index, [=](i64 i) { return weights[i]; }, starts[t], starts[t + 1], table, W, row);
      for (i64 column = 0; column < W; ++column) row[column] = rest[t * W + column] - row[column];
      squares[t] = dot(row, row, W);
      dots(index, starts[t], starts[t + 1], table, W, row, products);
    }
  });
}

void kth_largest_of(const float* values, i64 n, i64 k, float* out, int) { *out = kth_largest(values, n, k); }

// Stable counting sort of pairs by latent: order [n], tokens in that order [n], and where each latent starts [S + 1]. Of each
// latent the pairs of the first part of all pairs lie before those of the next, so it does not matter how many parts there are.
void by_latent(const i64* latents, const i64* tokens, i64 n, i64 S, i64* order, i64* sorted_tokens, i64* starts,
               int threads) {
  i64 parts = std::max<i64>(1, std::min<i64>(threads, n / LEAST_WORK));
  std::vector<i64> next(parts * S);  // of each part and latent: how many there are, then where the next one goes
  auto each = [&](auto f) {
    split(parts, parts * LEAST_WORK, threads, [&](i64 begin, i64 end) {
      for (i64 part = begin; part < end; ++part) f(n * part / parts, n * (part + 1) / parts, next.data() + part * S);
    });
  };
  each([&](i64 begin, i64 end, i64* counts) {
    for (i64 i = begin; i < end; ++i) ++counts[latents[i]];
  });
  i64 at = 0;
  for (i64 s = 0; s < S; ++s) {
    starts[s] = at;
    for (i64 part = 0; part < parts; ++part) {
      i64 count = next[part * S + s];
      next[part * S + s] = at;
      at += count;
    }
  }
  starts[S] = at;
  each([&](i64 begin, i64 end, i64* places) {
    for (i64 i = begin; i < end; ++i) {
      i64 place = places[latents[i]]++;
      order[place] = i;
      sorted_tokens[place] = tokens[i];
    }
  });
}

// Of each row: grad · grad, and, where rows are to keep their norm, grad · row and row · row.
void row_products(const float* rows, const float* grad, i64 S, i64 W, float* gg, float* gr, float* rr, int threads) {
  split(S, S * W, threads, [=](i64 begin, i64 end) {
    for (i64 s = begin; s < end; ++s) {
      gg[s] = dot(grad + s * W, grad + s * W, W);
      if (gr) gr[s] = dot(grad + s * W, rows + s * W, W), rr[s] = dot(rows + s * W, rows + s * W, W);
    }
  });
}

// Adam on each row, in one pass: factor · (grad − along[s] · row), the update, and the row back to norm `norm` if > 0.
void adam_rows(float* rows, const float* grad, float* mean, float* square, const float* along, i64 S, i64 W, float factor,
               float mean_share, float square_share, float step, float root_correction, float eps, float norm, int threads) {
  split(S, S * W, threads, [=](i64 begin, i64 end) {
    for (i64 s = begin; s < end; ++s) {
      float* row = rows + s * W;
      float *m = mean + s * W, *v = square + s * W;
      const float* g = grad + s * W;
      float off = along ? along[s] : 0.0f, length = 0;
      for (i64 i = 0; i < W; ++i) {
        float gradient = factor * (g[i] - off * row[i]);
        m[i] += mean_share * (gradient - m[i]);
        v[i] += square_share * (gradient * gradient - v[i]);
        row[i] -= step * m[i] / (std::sqrt(v[i]) / root_correction + eps);
      }
      if (norm > 0) {
        length = norm / std::sqrt(dot(row, row, W));
        for (i64 i = 0; i < W; ++i) row[i] *= length;
      }
    }
  });
}

}  // extern "C"
