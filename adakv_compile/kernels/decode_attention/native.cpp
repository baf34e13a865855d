// One token of every row attends to its store, on a CPU; the contract is in op.py.
//
// Every entry is read once for all query heads that share it. A head's entries are cut into pieces of one size, whatever
// the number of threads, and the pieces of a head are merged in their order: so results are the same bits on any number
// of threads, and those of a batch are those of its rows. Softmax is float32.
//
// Nothing of PyTorch is included: headers would take ten times as long to compile as all of this.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#if defined(__AVX512F__) || defined(__F16C__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int W = 16;
#define EVEN 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30
#define ODD 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31
#else
constexpr int W = 8;
#define EVEN 0, 2, 4, 6, 8, 10, 12, 14
#define ODD 1, 3, 5, 7, 9, 11, 13, 15
#endif

typedef float Vec __attribute__((vector_size(W * 4)));
typedef int32_t Int __attribute__((vector_size(W * 4)));
typedef uint32_t Word __attribute__((vector_size(W * 4)));
typedef uint16_t Half __attribute__((vector_size(W * 2)));

// Entries of a piece: what one thread does at once. 128 KB of keys and values at 64 float32 dimensions.
constexpr int64_t PIECE = 256;
// Entries whose logits are held at once: keys and values of so many stay in the first caches while a group uses them.
constexpr int64_t BLOCK = 32;
// Query heads that are computed together, and products that are summed up together.
constexpr int TILE = 4;
constexpr int SUMS = 8;
// Multiplications below which a second thread costs more than it saves.
constexpr int64_t LEAST_PARALLEL = 1 << 16;
// Logits at or below are hidden: no product of finite numbers comes near.
constexpr float HIDDEN = -1e30f;
constexpr float SEEN = -1e29f;

inline Vec splat(float x) { return Vec{} + x; }

inline Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

struct BFloat16 { uint16_t bits; };
struct Float16 { uint16_t bits; };

inline Vec load(const BFloat16* p) {
  Half h;
  std::memcpy(&h, p, sizeof h);
  Word w = __builtin_convertvector(h, Word) << 16;
  Vec v;
  std::memcpy(&v, &w, sizeof v);
  return v;
}

#if defined(__AVX512F__)
inline Vec load(const Float16* p) { return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
constexpr bool HAS_FLOAT16 = true;
#elif defined(__F16C__)
inline Vec load(const Float16* p) { return (Vec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
constexpr bool HAS_FLOAT16 = true;
#else
inline Vec load(const Float16*) { return Vec{}; }
constexpr bool HAS_FLOAT16 = false;
#endif

// The first `count` elements, then zeros; never reads behind them.
template <class T>
inline Vec load(const T* p, int count) {
  if (count >= W) return load(p);
  T some[W] = {};
  std::memcpy(some, p, count * sizeof(T));
  return load(some);
}

template <class T>
float widen(T x) {
  T some[W] = {x};
  return load(some)[0];
}

inline void store(float x, float* p) { *p = x; }

inline void store(float x, BFloat16* p) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  // To the nearest, ties to even; a NaN stays one.
  p->bits = x != x ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline void store(float x, Float16* p) {
#if defined(__F16C__) || defined(__AVX512F__)
  p->bits = static_cast<uint16_t>(_mm_extract_epi16(_mm_cvtps_ph(_mm_set_ss(x), _MM_FROUND_TO_NEAREST_INT), 0));
#else
  p->bits = 0;
#endif
}

// exp for what is not above 0, to about 1 unit in the last place; 0 below the normal numbers.
inline Vec exp_negative(Vec x) {
  Vec clamped = x < splat(-87.0f) ? splat(-87.0f) : x;
  // Conversion cuts off towards zero, so that half is taken off what is negative.
  Int n = __builtin_convertvector(clamped * 1.44269504f - 0.5f, Int);
  Vec m = __builtin_convertvector(n, Vec);
  Vec r = (clamped - m * 0.693359375f) + m * 2.12194440e-4f;
  Vec p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  Int scale = (n + 127) << 23;
  Vec power;
  std::memcpy(&power, &scale, sizeof power);
  return x < splat(-87.0f) ? Vec{} : p * power;
}

inline Vec fold(Vec a, Vec b) {
  return __builtin_shufflevector(a, b, EVEN) + __builtin_shufflevector(a, b, ODD);
}

// The sums of eight vectors' elements.
inline void sum_each(const Vec (&v)[SUMS], float* out) {
  Vec a = fold(fold(v[0], v[1]), fold(v[2], v[3]));
  Vec b = fold(fold(v[4], v[5]), fold(v[6], v[7]));
  Vec c = fold(a, b);
  if (W == 16) c = fold(c, c);
  std::memcpy(out, &c, SUMS * sizeof(float));
}

inline float sum(Vec v) {
  float s = 0;
  for (int i = 0; i < W; ++i) s += v[i];
  return s;
}

inline float largest(Vec v) {
  float s = v[0];
  for (int i = 1; i < W; ++i) s = std::max(s, v[i]);
  return s;
}

// Products of G queries with E entries at a time, E * G at most SUMS.
template <int G, class T>
void products(const float* q, int64_t q_stride, const T* keys, int64_t dim, int64_t count, float* out) {
  constexpr int E = SUMS / G;
  const int64_t whole = dim / W * W;
  const int rest = static_cast<int>(dim - whole);
  for (int64_t e = 0; e < count; e += E) {
    const T* rows[E];
    // The last ones are computed again where fewer are left: nothing behind the keys is read.
    for (int i = 0; i < E; ++i) rows[i] = keys + std::min(e + i, count - 1) * dim;
    Vec sums[SUMS] = {};
    for (int64_t d = 0; d < whole; d += W) {
      Vec k[E];
      for (int i = 0; i < E; ++i) k[i] = load(rows[i] + d);
      for (int g = 0; g < G; ++g) {
        const Vec x = load(q + g * q_stride + d);
        for (int i = 0; i < E; ++i) sums[g * E + i] += x * k[i];
      }
    }
    if (rest) {
      for (int i = 0; i < E; ++i) {
        const Vec k = load(rows[i] + whole, rest);
        for (int g = 0; g < G; ++g) sums[g * E + i] += load(q + g * q_stride + whole) * k;
      }
    }
    float found[SUMS];
    sum_each(sums, found);
    for (int g = 0; g < G; ++g)
      for (int i = 0; i < E && e + i < count; ++i) out[g * BLOCK + e + i] = found[g * E + i];
  }
}

// acc[g] += weights[g] @ values, in columns of C vectors.
template <int G, int C, class T>
void gather(const float* weights, const T* values, int64_t dim, int64_t count, float* acc, int64_t acc_stride) {
  Vec a[G][C];
  for (int g = 0; g < G; ++g)
    for (int c = 0; c < C; ++c) a[g][c] = load(acc + g * acc_stride + c * W);
  for (int64_t e = 0; e < count; ++e) {
    Vec v[C];
    for (int c = 0; c < C; ++c) v[c] = load(values + e * dim + c * W);
    for (int g = 0; g < G; ++g)
      for (int c = 0; c < C; ++c) a[g][c] += weights[g * BLOCK + e] * v[c];
  }
  for (int g = 0; g < G; ++g)
    for (int c = 0; c < C; ++c) std::memcpy(acc + g * acc_stride + c * W, &a[g][c], sizeof(Vec));
}

template <int G, class T>
void gather_rest(const float* weights, const T* values, int64_t dim, int rest, int64_t count, float* acc, int64_t stride) {
  for (int64_t e = 0; e < count; ++e) {
    const Vec v = load(values + e * dim, rest);
    for (int g = 0; g < G; ++g) {
      Vec a = load(acc + g * stride) + weights[g * BLOCK + e] * v;
      std::memcpy(acc + g * stride, &a, sizeof a);
    }
  }
}

struct Call {
  int64_t batch, heads, group, key_dim, value_dim, slots, capacity, length, start;
  int64_t key_room, value_room;  // dimensions, rounded up to whole vectors
  float scale, softcap;          // softcap 0: none
  int64_t first_seen;            // position of the first key inside the sliding window
  const int32_t *offsets, *positions;
  const uint8_t *prefix_seen, *tail_seen;  // [B, slots] and [B, length], or null
};

// A piece of one head: entries begin .. end of its prefix or its tail.
struct Piece {
  int64_t row, head, begin, end;
  bool tail;
};

// What a query head of a piece found: largest logit, sum of exponentials, and their products with the values.
struct Found {
  float* largest;
  float* total;
  float* acc;
};

template <int G, class T>
void attend_block(const Call& c, const float* q, const T* keys, const T* values, const uint8_t* seen, int64_t count,
                  float* logits, Found f) {
  products<G>(q, c.key_room, keys, c.key_dim, count, logits);
  const int64_t padded = (count + W - 1) / W * W;
  for (int g = 0; g < G; ++g) {
    float* row = logits + g * BLOCK;
    if (c.softcap > 0)
      for (int64_t e = 0; e < count; ++e) row[e] = c.softcap * std::tanh(row[e] / c.softcap);
    if (seen)
      for (int64_t e = 0; e < count; ++e) row[e] = seen[e] ? row[e] : HIDDEN;
    for (int64_t e = count; e < padded; ++e) row[e] = HIDDEN;
    Vec most = load(row);
    for (int64_t e = W; e < padded; e += W) {
      const Vec x = load(row + e);
      most = x > most ? x : most;
    }
    const float before = f.largest[g], now = std::max(before, largest(most));
    float total = 0;
    // Nothing seen yet: all weights are 0, whatever is taken off.
    const float base = now > SEEN ? now : 0.0f;
    for (int64_t e = 0; e < padded; e += W) {
      const Vec w = exp_negative(load(row + e) - base);
      total += sum(w);
      std::memcpy(row + e, &w, sizeof w);
    }
    if (now > before) {
      const float factor = before > SEEN ? std::exp(before - now) : 0.0f;
      f.total[g] *= factor;
      for (int64_t d = 0; d < c.value_room; d += W) {
        Vec a = load(f.acc + g * c.value_room + d) * factor;
        std::memcpy(f.acc + g * c.value_room + d, &a, sizeof a);
      }
      f.largest[g] = now;
    }
    f.total[g] += total;
  }
  constexpr int C = G >= 4 ? 4 : 8 / G;
  int64_t d = 0;
  for (; d + C * W <= c.value_dim; d += C * W) gather<G, C>(logits, values + d, c.value_dim, count, f.acc + d, c.value_room);
  for (; d + W <= c.value_dim; d += W) gather<G, 1>(logits, values + d, c.value_dim, count, f.acc + d, c.value_room);
  if (d < c.value_dim)
    gather_rest<G>(logits, values + d, c.value_dim, static_cast<int>(c.value_dim - d), count, f.acc + d, c.value_room);
}

template <class T>
void attend_piece(const Call& c, const Piece& p, const float* queries, const T* keys, const T* values,
                  const T* tail_keys, const T* tail_values, Found f) {
  const int64_t bh = p.row * c.heads + p.head;
  const T *k = p.tail ? tail_keys + bh * c.capacity * c.key_dim : keys + p.row * c.slots * c.key_dim;
  const T *v = p.tail ? tail_values + bh * c.capacity * c.value_dim : values + p.row * c.slots * c.value_dim;
  const uint8_t* seen = p.tail ? c.tail_seen : c.prefix_seen;
  if (seen) seen += p.row * (p.tail ? c.length : c.slots);
  alignas(64) float logits[TILE * BLOCK];
  for (int64_t e = p.begin; e < p.end; e += BLOCK) {
    const int64_t count = std::min(BLOCK, p.end - e);
    for (int64_t g = 0; g < c.group; g += TILE) {
      const float* q = queries + (bh * c.group + g) * c.key_room;
      const T *kb = k + e * c.key_dim, *vb = v + e * c.value_dim;
      const uint8_t* s = seen ? seen + e : nullptr;
      const Found at = {f.largest + g, f.total + g, f.acc + g * c.value_room};
      switch (std::min<int64_t>(TILE, c.group - g)) {
        case 1: attend_block<1>(c, q, kb, vb, s, count, logits, at); break;
        case 2: attend_block<2>(c, q, kb, vb, s, count, logits, at); break;
        case 3: attend_block<3>(c, q, kb, vb, s, count, logits, at); break;
        default: attend_block<4>(c, q, kb, vb, s, count, logits, at);
      }
    }
  }
}

// The pieces of all heads, those of a head one after the other, and where each head's begin.
void cut(const Call& c, std::vector<Piece>& pieces, std::vector<int64_t>& first) {
  for (int64_t b = 0; b < c.batch; ++b) {
    const int32_t* bounds = c.offsets + b * (c.heads + 1);
    const int32_t* positions = c.positions + b * c.slots;
    for (int64_t h = 0; h < c.heads; ++h) {
      first.push_back(static_cast<int64_t>(pieces.size()));
      int64_t begin = bounds[h];
      const int64_t end = bounds[h + 1];
      // Positions ascend inside a head: what a sliding window hides is its beginning.
      if (c.first_seen > 0) begin = std::lower_bound(positions + begin, positions + end, c.first_seen) - positions;
      for (; begin < end; begin += PIECE) pieces.push_back({b, h, begin, std::min(begin + PIECE, end), false});
      begin = std::max<int64_t>(0, c.first_seen - c.start);
      for (; begin < c.length; begin += PIECE) pieces.push_back({b, h, begin, std::min(begin + PIECE, c.length), true});
    }
  }
  first.push_back(static_cast<int64_t>(pieces.size()));
}

template <class T>
void merge(const Call& c, int64_t bh, int64_t first, int64_t last, const float* found, int64_t stride,
           const float* sinks, T* out) {
  std::vector<float> acc(c.value_room);
  for (int64_t g = 0; g < c.group; ++g) {
    const int64_t head = bh % c.heads * c.group + g;
    const float sink = sinks ? std::max(sinks[head], HIDDEN) : HIDDEN;
    float most = sink;
    for (int64_t p = first; p < last; ++p) most = std::max(most, found[p * stride + g]);
    const float base = most > SEEN ? most : 0.0f;
    float total = sink > SEEN ? std::exp(sink - base) : 0.0f;
    std::fill(acc.begin(), acc.end(), 0.0f);
    for (int64_t p = first; p < last; ++p) {
      const float* some = found + p * stride;
      if (some[g] <= SEEN) continue;
      const float factor = std::exp(some[g] - base);
      total += factor * some[c.group + g];
      const float* theirs = some + 2 * c.group + g * c.value_room;
      for (int64_t d = 0; d < c.value_dim; ++d) acc[d] += factor * theirs[d];
    }
    T* row = out + (bh * c.group + g) * c.value_dim;
    // A query that sees nothing gets zeros; a NaN stays one.
    for (int64_t d = 0; d < c.value_dim; ++d) store(total == 0 ? 0.0f : acc[d] / total, row + d);
  }
}

template <class T>
void append(const Call& c, const T* fresh, const int64_t* strides, int64_t dim, T* tail) {
  for (int64_t b = 0; b < c.batch; ++b)
    for (int64_t h = 0; h < c.heads; ++h) {
      const T* from = fresh + b * strides[0] + h * strides[1];
      T* to = tail + ((b * c.heads + h) * c.capacity + c.length - 1) * dim;
      for (int64_t d = 0; d < dim; ++d) to[d] = from[d * strides[2]];
    }
}

template <class T>
void decode(const Call& c, const int64_t* ints, void* const* tensors, int threads) {
  // The order is that in which native.py lists them.
  const T *query = (const T*)tensors[0], *key_new = (const T*)tensors[1], *value_new = (const T*)tensors[2];
  const T *keys = (const T*)tensors[3], *values = (const T*)tensors[4];
  const float* sinks = (const float*)tensors[12];
  T *tail_keys = (T*)tensors[7], *tail_values = (T*)tensors[8], *out = (T*)tensors[13];
  const int64_t* strides = ints + 10;
  append(c, key_new, strides + 3, c.key_dim, tail_keys);
  append(c, value_new, strides + 6, c.value_dim, tail_values);

  std::vector<float> queries(c.batch * c.heads * c.group * c.key_room, 0.0f);
  for (int64_t b = 0; b < c.batch; ++b)
    for (int64_t h = 0; h < c.heads * c.group; ++h)
      for (int64_t d = 0; d < c.key_dim; ++d)
        queries[(b * c.heads * c.group + h) * c.key_room + d] =
            widen(query[b * strides[0] + h * strides[1] + d * strides[2]]) * c.scale;

  std::vector<Piece> pieces;
  std::vector<int64_t> first;
  cut(c, pieces, first);
  const int64_t count = static_cast<int64_t>(pieces.size()), rows = c.batch * c.heads;
  // Of each piece: the largest logits of its group, their totals, and the weighted sums of values. Not initialised.
  const int64_t stride = c.group * (2 + c.value_room);
  std::unique_ptr<float[]> found(new float[count * stride]);
  int64_t work = 0;
  for (const Piece& p : pieces) work += p.end - p.begin;
  work *= c.group * (c.key_dim + c.value_dim);
  if (work < LEAST_PARALLEL) threads = 1;

#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < count; ++i) {
      float* some = found.get() + i * stride;
      std::fill(some, some + c.group, HIDDEN);
      std::fill(some + c.group, some + stride, 0.0f);
      attend_piece(c, pieces[i], queries.data(), keys, values, (const T*)tail_keys, (const T*)tail_values,
                   Found{some, some + c.group, some + 2 * c.group});
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < rows; ++i) merge(c, i, first[i], first[i + 1], found.get(), stride, sinks, out);
  }
}

// Whether heads lie one behind the other inside of the slots: what is read by them stays inside of its memory.
bool ascending(const Call& c) {
  for (int64_t b = 0; b < c.batch; ++b) {
    const int32_t* bounds = c.offsets + b * (c.heads + 1);
    if (bounds[0] < 0 || bounds[c.heads] > c.slots || !std::is_sorted(bounds, bounds + c.heads + 1)) return false;
  }
  return true;
}

}  // namespace

// Returns 0, or why nothing was done: 1 the tail has no room, 2 the dtype or these offsets can't be computed with.
extern "C" int adakv_decode_attention(const int64_t* ints, const double* floats, void* const* tensors) {
  Call c;
  c.batch = ints[0], c.heads = ints[1], c.group = ints[2], c.key_dim = ints[3], c.value_dim = ints[4];
  c.slots = ints[5], c.capacity = ints[6];
  const int64_t window = ints[7], dtype = ints[8];
  const int threads = static_cast<int>(ints[9]);
  c.scale = static_cast<float>(floats[0]), c.softcap = static_cast<float>(floats[1]);
  c.offsets = (const int32_t*)tensors[5], c.positions = (const int32_t*)tensors[6];
  int32_t* cursor = (int32_t*)tensors[9];
  c.prefix_seen = (const uint8_t*)tensors[10], c.tail_seen = (const uint8_t*)tensors[11];
  c.length = cursor[0] + 1, c.start = cursor[1];
  c.key_room = (c.key_dim + W - 1) / W * W, c.value_room = (c.value_dim + W - 1) / W * W;
  c.first_seen = window > 0 ? c.start + c.length - window : 0;
  if (c.length > c.capacity) return 1;
  if (c.length < 1 || !ascending(c) || (dtype == 2 && !HAS_FLOAT16)) return 2;
  if (dtype == 0) decode<float>(c, ints, tensors, threads);
  if (dtype == 1) decode<BFloat16>(c, ints, tensors, threads);
  if (dtype == 2) decode<Float16>(c, ints, tensors, threads);
  cursor[0] = static_cast<int32_t>(c.length);
  return 0;
}
