// One attention block of K experts on a CPU: forward and backward of eq. 5 to 7, post-norm, tile by tile.
//
// A tile is some whole sequences of one expert, small enough that what passes between two matrix products stays in a core's L2
// cache. Tiles share nothing, so each core runs its own from end to end, and its products are single-threaded.
// syncrec/layers/transformer.py has the same in PyTorch's operations: tests hold the two together in float64.
//
// Products are products.h's. Shapes: K experts, M packed tokens, S sequences, r width, f inner width, d = r / heads, n rows of a tile. Value is the type of
// what is stored and multiplied (float, double, bfloat16), Real that of sums, norms and softmax (float, double, float).

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <type_traits>
#include <vector>

#include "products.h"

namespace {

using at::BFloat16;
using products::Right, products::add_outer;
using at::Tensor;

constexpr int64_t kQueries = 32;  // of a sequence at a time: later keys than its last are left out
constexpr double kEps = 1e-5;     // of LayerNorm

template <typename Value>
using RealOf = std::conditional_t<std::is_same_v<Value, double>, double, float>;

// ---- numbers

inline float real(float x) { return x; }
inline double real(double x) { return x; }
inline float real(BFloat16 x) {
  uint32_t bits = uint32_t(x.x) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

template <typename Value>
inline Value stored(RealOf<Value> x) {
  if constexpr (std::is_same_v<Value, BFloat16>) {  // to nearest even, without a branch, so that loops over it are vectorised
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    uint16_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return BFloat16(x == x ? rounded : uint16_t(0x7fc0), BFloat16::from_bits());
  } else {
    return x;
  }
}

inline double exponential(double x) { return std::exp(x); }
inline float exponential(float x) {  // 2^i · e^f, |f| ≤ ln 2 / 2, to 2 units in the last place; below −87 it is about e^−87
  x = x < -87.0f ? -87.0f : x;
  x = x > 88.0f ? 88.0f : x;
  float shifted = x * 1.44269504f + 12582912.0f;  // the sum's last bits are the nearest integer
  float whole = shifted - 12582912.0f;
  float f = x - whole * 0.693359375f + whole * 2.12194440e-4f;
  float p = 1.9875691e-4f;
  p = p * f + 1.3981999e-3f;
  p = p * f + 8.3334519e-3f;
  p = p * f + 4.1665796e-2f;
  p = p * f + 1.6666665e-1f;
  p = p * f + 5.0000001e-1f;
  p = p * f * f + f + 1.0f;
  int32_t exponent;
  std::memcpy(&exponent, &shifted, 4);
  exponent = (exponent << 23) + (127 << 23);
  float power;
  std::memcpy(&power, &exponent, 4);
  return p * power;
}

// Φ(x) and its density, the two that GELU and its derivative are made of.
inline void normal(double x, double& below, double& density) {
  below = 0.5 * (1 + std::erf(x * M_SQRT1_2));
  density = 0.3989422804014327 * std::exp(-0.5 * x * x);
}
inline void normal(float x, float& below, float& density) {  // Abramowitz and Stegun 7.1.26: to 1.5e-7
  float e = exponential(-0.5f * x * x);
  float t = 1.0f / (1.0f + 0.3275911f * 0.70710678f * std::fabs(x));
  float p = 1.061405429f;
  p = p * t - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  float tail = 0.5f * p * t * e;
  below = x < 0 ? tail : 1.0f - tail;
  density = 0.39894228f * e;
}

// The matrices of all experts, (K, k, n) or, transposed, (K, n, k), as right factors.
template <typename Value>
struct Rights {
  Rights(const Value* data, int64_t experts, int64_t k, int64_t n, bool transposed)
      : room(new uint32_t[experts * products::panels_size<Value>(k, n)]) {
    for (int64_t expert = 0; expert < experts; expert++)
      of_expert.emplace_back(data + expert * k * n, transposed ? k : n, k, n, transposed,
                             room.get() + expert * products::panels_size<Value>(k, n));
  }
  const Right<Value>& operator[](int64_t expert) const { return of_expert[expert]; }

  std::unique_ptr<uint32_t[]> room;
  std::vector<Right<Value>> of_expert;
};

// ---- dropout: what each element is multiplied by, from (seed, site, expert, token, column) alone

struct Dropout {
  uint32_t dropped;  // of 65,536
  float scale;
  uint64_t seed;

  static uint64_t mixed(uint64_t z) {  // SplitMix64
    z += 0x9e3779b97f4a7c15;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
  }

  template <typename Real>
  void row(int64_t site, int64_t expert, int64_t token, int64_t width, Real* factor) const {
    uint32_t key = mixed(mixed(seed + site) + (uint64_t(expert) << 40) + uint64_t(token));
    const int64_t half = (width + 1) / 2;
    const int32_t least = dropped;
    const Real kept = scale;
#pragma GCC ivdep
    for (int64_t c = 0; c < half; c++) {
      uint32_t x = key + uint32_t(c) * 0x9e3779b9u;
      x = (x ^ (x >> 16)) * 0x7feb352du;
      x = (x ^ (x >> 15)) * 0x846ca68bu;
      x ^= x >> 16;
      // 0 below `least`, else 1, from the sign of a difference: of a comparison the compiler makes a branch.
      factor[c] = kept * Real(1 + ((int32_t(x & 0xffff) - least) >> 31));
      factor[c + half] = kept * Real(1 + ((int32_t(x >> 16) - least) >> 31));
    }
  }
};

// ---- what a stack is given

template <typename Value>
struct Weights {  // of all K experts
  using Real = RealOf<Value>;
  const Value *qkv, *out, *w1, *w2;
  const Real *b1, *b2, *scale1, *shift1, *scale2, *shift2;
};
constexpr int kWeights = 10;  // in this order

struct Sizes {
  int64_t experts, tokens, width, inner, heads;
};

template <typename Value>
struct Kept {  // for backward, each (K, M, …); null where nothing is
  using Real = RealOf<Value>;
  Value *qkv, *mixed, *normed1, *hidden, *normed2;
  Real *log_sum, *deviation1, *deviation2;  // deviation: 1 / σ of a row
};
constexpr int kKept = 8;

struct Tile {
  int64_t expert, first, last;  // sequences first … last − 1
};

// Sequences of all experts, shared out evenly by tokens over `parts`; each part's cut into tiles of about `rows`.
std::vector<std::vector<Tile>> share_out(const int64_t* starts, int64_t sequences, int64_t experts, int64_t parts, int64_t rows) {
  std::vector<std::vector<Tile>> shares(parts);
  const int64_t tokens = starts[sequences];
  int64_t expert = 0, sequence = 0;
  for (int64_t part = 0; part < parts; part++) {
    const int64_t until = experts * tokens * (part + 1) / parts;
    while (expert < experts) {
      int64_t end = sequence;  // as far as this part goes within this expert
      while (end < sequences && expert * tokens + (starts[end] + starts[end + 1]) / 2 < until) end++;
      if (part == parts - 1) end = sequences;
      const int64_t run = starts[end] - starts[sequence];
      const int64_t pieces = (run + rows - 1) / rows, origin = starts[sequence];
      for (int64_t piece = 0; piece < pieces; piece++) {
        const int64_t bound = origin + run * (piece + 1) / pieces, first = sequence;
        while (sequence < end && (starts[sequence + 1] <= bound || sequence == first)) sequence++;
        if (piece == pieces - 1) sequence = end;
        if (starts[sequence] > starts[first]) shares[part].push_back({expert, first, sequence});
      }
      sequence = end;
      if (end < sequences) break;
      expert++, sequence = 0;
    }
  }
  return shares;
}

int64_t largest(const std::vector<std::vector<Tile>>& shares, const int64_t* starts) {
  int64_t rows = 0;
  for (const auto& share : shares)
    for (const auto& tile : share) rows = std::max(rows, starts[tile.last] - starts[tile.first]);
  return rows;
}

int64_t longest(const int64_t* starts, int64_t sequences) {
  int64_t length = 0;
  for (int64_t s = 0; s < sequences; s++) length = std::max(length, starts[s + 1] - starts[s]);
  return length;
}

// Memory of a tile, not filled. Where Value and Real are the same type, what would only convert uses what is there already.
template <typename Number>
struct Room {
  explicit Room(int64_t size) : memory(new Number[size]) {}
  Number* data() { return memory.get(); }
  std::unique_ptr<Number[]> memory;
};

template <typename To, typename From, typename Memory>
To* same_or(From* given, Memory& room) {
  if constexpr (std::is_same_v<To, From>) return given;
  else return room.data();
}
template <typename Real, typename Value>
void converted(const Real* given, int64_t size, Value* out) {
  if constexpr (!std::is_same_v<Value, Real>)
#pragma GCC ivdep
    for (int64_t i = 0; i < size; i++) out[i] = stored<Value>(given[i]);
}
template <typename Real, typename Value>
const Value* as_value(const Real* given, int64_t size, Room<Value>& room) {
  if constexpr (std::is_same_v<Value, Real>) return given;
  else {
    converted(given, size, room.data());
    return room.data();
  }
}
// ---- the pieces of a block, on the rows of one tile

template <typename Value>
struct Worker {
  using Real = RealOf<Value>;
  const Sizes& sizes;
  const Dropout* dropout;  // null: none
  const int64_t* starts;
  std::vector<Real> factor, row, scores, more_scores;
  std::vector<Value> shares, more_shares;          // scores as they are multiplied
  std::vector<uint32_t> keys, keys_across, values;  // panels of a sequence's
  std::vector<uint32_t> scratch;

  Worker(const Sizes& sizes, const Dropout* dropout, const int64_t* starts, int64_t length)
      : sizes(sizes), dropout(dropout), starts(starts), factor(sizes.width + 1, Real(1)), row(sizes.width),
        scores(kQueries * (length + 1)), more_scores(kQueries * (length + 1)), shares(products::kUnit<Value> > 1 ? scores.size() : 0),
        more_shares(shares.size()) {
    const int64_t d = sizes.width / sizes.heads;
    keys.resize(products::panels_size<Value>(length, d));
    values.resize(std::max(products::panels_size<Value>(length, d), products::panels_size<Value>(d, length)));
    keys_across.resize(products::panels_size<Value>(d, length));
  }

  const Real* factors(int64_t site, const Tile& tile, int64_t i) {
    if (dropout != nullptr) dropout->row(site, tile.expert, starts[tile.first] + i, sizes.width, factor.data());
    return factor.data();
  }

  // LayerNorm(x + drop(branch + bias)): out, the same as Value, x̂ and 1 / σ. bias: null for none. x may be out.
  __attribute__((noinline)) void residual_norm(int64_t site, const Tile& tile, int64_t rows, const Real* x, const Real* branch, const Real* bias,
                     const Real* scale, const Real* shift, Real* out, Value* out_value, Value* normed, Real* deviation) {
    const int64_t width = sizes.width;
    Real* u = row.data();
    for (int64_t i = 0; i < rows; i++, x += width, branch += width, out += width) {
      const Real* keep = factors(site, tile, i);
      Real mean = 0, square = 0;
      if (bias == nullptr) {
#pragma omp simd reduction(+ : mean)
        for (int64_t c = 0; c < width; c++) mean += u[c] = x[c] + keep[c] * branch[c];
      } else {
#pragma omp simd reduction(+ : mean)
        for (int64_t c = 0; c < width; c++) mean += u[c] = x[c] + keep[c] * (branch[c] + bias[c]);
      }
      mean /= width;
#pragma omp simd reduction(+ : square)
      for (int64_t c = 0; c < width; c++) square += (u[c] - mean) * (u[c] - mean);
      const Real inverse = 1 / std::sqrt(square / width + Real(kEps));
#pragma GCC ivdep
      for (int64_t c = 0; c < width; c++) {
        const Real y = (u[c] - mean) * inverse * scale[c] + shift[c];
        out[c] = y;
      }
      if (out_value != nullptr) {
        converted(out, width, out_value);
        out_value += width;
      }
      if (normed != nullptr) {
#pragma GCC ivdep
        for (int64_t c = 0; c < width; c++) normed[c] = stored<Value>((u[c] - mean) * inverse);
        deviation[i] = inverse;
        normed += width;
      }
    }
  }

  // Gradient of LayerNorm's input in place of that of its output; `branch`: the same through dropout.
  __attribute__((noinline)) void residual_norm_backward(int64_t site, const Tile& tile, int64_t rows, const Value* normed, const Real* deviation,
                              const Real* scale, Real* gradient, Value* branch, Real* bias_sum, Real* scale_sum, Real* shift_sum) {
    const int64_t width = sizes.width;
    for (int64_t i = 0; i < rows; i++, normed += width, gradient += width, branch += width) {
      Real mean = 0, along = 0;
#pragma omp simd reduction(+ : mean, along)
      for (int64_t c = 0; c < width; c++) {
        const Real g = gradient[c] * scale[c];
        mean += g, along += g * real(normed[c]);
      }
      mean /= width, along /= width;
      const Real* keep = factors(site, tile, i);
#pragma GCC ivdep
      for (int64_t c = 0; c < width; c++) {
        const Real hat = real(normed[c]), g = gradient[c];
        scale_sum[c] += g * hat, shift_sum[c] += g;
        const Real u = deviation[i] * (g * scale[c] - mean - along * hat);
        gradient[c] = u;
        branch[c] = stored<Value>(u * keep[c]);
        if (bias_sum != nullptr) bias_sum[c] += u * keep[c];
      }
    }
  }

  // x̂ scale + shift: what LayerNorm gave.
  __attribute__((noinline)) void renormed(int64_t rows, const Value* normed, const Real* scale, const Real* shift, Value* out) {
    for (int64_t i = 0; i < rows; i++, normed += sizes.width, out += sizes.width)
#pragma GCC ivdep
      for (int64_t c = 0; c < sizes.width; c++) out[c] = stored<Value>(real(normed[c]) * scale[c] + shift[c]);
  }

  // hidden = product + bias; out = GELU(hidden). hidden may be product.
  __attribute__((noinline)) void gelu(int64_t rows, const Real* product, const Real* bias, Value* hidden, Value* out) {
    for (int64_t i = 0; i < rows; i++, product += sizes.inner, hidden += sizes.inner, out += sizes.inner)
#pragma GCC ivdep
      for (int64_t c = 0; c < sizes.inner; c++) {
        const Real x = product[c] + bias[c];
        Real below, density;
        normal(x, below, density);
        hidden[c] = stored<Value>(x);
        out[c] = stored<Value>(x * below);
      }
  }

  // out = GELU(hidden), and its derivative.
  __attribute__((noinline)) void gelu_again(int64_t rows, const Value* hidden, Value* out, Real* slope) {
#pragma GCC ivdep
    for (int64_t i = 0; i < rows * sizes.inner; i++) {
      const Real x = real(hidden[i]);
      Real below, density;
      normal(x, below, density);
      out[i] = stored<Value>(x * below);
      slope[i] = below + x * density;
    }
  }

  // out = gradient * slope; bias_sum: its sum. out may be gradient.
  __attribute__((noinline)) void sloped(int64_t rows, const Real* slope, const Real* gradient, Value* out, Real* bias_sum) {
    for (int64_t i = 0; i < rows; i++, slope += sizes.inner, gradient += sizes.inner, out += sizes.inner)
#pragma GCC ivdep
      for (int64_t c = 0; c < sizes.inner; c++) {
        const Real g = gradient[c] * slope[c];
        bias_sum[c] += g;
        out[c] = stored<Value>(g);
      }
  }

  // softmax(Q Kᵀ / √d) V of each sequence; qkv: (n, 3 r), mixed: (n, r), log_sum (n, heads): log Σ exp of each row.
  __attribute__((noinline)) void attend(const Tile& tile, const Value* qkv, Value* mixed, Real* log_sum) {
    const int64_t r = sizes.width, d = r / sizes.heads, origin = starts[tile.first];
    const Real scale = 1 / std::sqrt(Real(d));
    for (int64_t s = tile.first; s < tile.last; s++)
      for (int64_t head = 0; head < sizes.heads; head++) {
        const int64_t begin = starts[s] - origin, length = starts[s + 1] - starts[s];
        const Value *q = qkv + begin * 3 * r + head * d, *k = q + r, *v = k + r;
        const Right<Value> across(k, 3 * r, d, length, true, keys_across.data()), mixing(v, 3 * r, length, d, false, values.data());
        for (int64_t i = 0; i < length; i += kQueries) {
          const int64_t rows = std::min(kQueries, length - i), seen = i + rows, step = seen + seen % 2;
          Real* p = scores.data();
          Value* share = same_or<Value>(p, shares);
          across.times(rows, q + i * 3 * r, 3 * r, p, step, d, seen);
          for (int64_t row = 0; row < rows; row++) {
            Real* scored = p + row * step;
            const int64_t own = i + row + 1;
            Real most = scored[0], sum = 0;
#pragma omp simd reduction(max : most)
            for (int64_t j = 0; j < own; j++) most = scored[j] > most ? scored[j] : most;
#pragma omp simd reduction(+ : sum)
            for (int64_t j = 0; j < own; j++) sum += scored[j] = exponential(scale * (scored[j] - most));
            const Real inverse = 1 / sum;
            Value* to = share + row * step;
#pragma GCC ivdep
            for (int64_t j = 0; j < own; j++) to[j] = stored<Value>(scored[j] * inverse);
            std::fill(to + own, to + step, Value(0));
            if (log_sum != nullptr) log_sum[(begin + i + row) * sizes.heads + head] = scale * most + std::log(sum);
          }
          mixing.times(rows, share, step, mixed + (begin + i) * r + head * d, r, seen, d);
        }
      }
  }

  // Gradient of Q, K and V (n, 3 r) from that of what they were mixed to, `gradient` (n, r).
  __attribute__((noinline)) void attend_backward(const Tile& tile, const Value* qkv, const Value* mixed, const Real* log_sum,
                                                 const Value* gradient, Real* qkv_gradient) {
    const int64_t r = sizes.width, d = r / sizes.heads, origin = starts[tile.first];
    const Real scale = 1 / std::sqrt(Real(d));
    for (int64_t s = tile.first; s < tile.last; s++)
      for (int64_t head = 0; head < sizes.heads; head++) {
        const int64_t begin = starts[s] - origin, length = starts[s + 1] - starts[s], at = begin * 3 * r + head * d;
        const Value *q = qkv + at, *k = q + r, *v = k + r;
        Real *dq = qkv_gradient + at, *dk = dq + r, *dv = dk + r;
        const Right<Value> across(k, 3 * r, d, length, true, keys_across.data()), back(k, 3 * r, length, d, false, keys.data()),
            unmixing(v, 3 * r, d, length, true, values.data());
        for (int64_t end = length; end > 0;) {  // the last queries first: they see all keys, so they set what others add to
          const int64_t i = (end - 1) / kQueries * kQueries, rows = end - i, seen = end, step = seen + seen % 2;
          const Value* dmixed = gradient + (begin + i) * r + head * d;
          Real *p = scores.data(), *dp = more_scores.data();
          Value *share = same_or<Value>(p, shares), *dshare = same_or<Value>(dp, more_shares);
          across.times(rows, q + i * 3 * r, 3 * r, p, step, d, seen);
          unmixing.times(rows, dmixed, r, dp, step, d, seen);
          for (int64_t row = 0; row < rows; row++) {
            const Value* own_mixed = mixed + (begin + i + row) * r + head * d;
            const Real log = log_sum[(begin + i + row) * sizes.heads + head];
            const int64_t own = i + row + 1;
            const Real *pr = p + row * step, *dpr = dp + row * step;
            Value *to = share + row * step, *dto = dshare + row * step;
            Real along = 0;
#pragma omp simd reduction(+ : along)
            for (int64_t c = 0; c < d; c++) along += real(dmixed[row * r + c]) * real(own_mixed[c]);
#pragma GCC ivdep
            for (int64_t j = 0; j < own; j++) {
              const Real of = exponential(scale * pr[j] - log);
              dto[j] = stored<Value>(of * (dpr[j] - along) * scale);
              to[j] = stored<Value>(of);
            }
            std::fill(to + own, to + step, Value(0));
            std::fill(dto + own, dto + step, Value(0));
          }
          if (end == length) {
            add_outer<false>(seen, d, rows, share, step, dmixed, r, dv, 3 * r, scratch);
            add_outer<false>(seen, d, rows, dshare, step, q + i * 3 * r, 3 * r, dk, 3 * r, scratch);
          } else {
            add_outer(seen, d, rows, share, step, dmixed, r, dv, 3 * r, scratch);
            add_outer(seen, d, rows, dshare, step, q + i * 3 * r, 3 * r, dk, 3 * r, scratch);
          }
          back.times(rows, dshare, step, dq + i * 3 * r, 3 * r, seen, d);
          end = i;
        }
      }
  }
};

// Runs `work(tiles, part)` for each part, each on a thread of its own.
template <typename Work>
void run(const std::vector<std::vector<Tile>>& shares, const Work& work) {
  at::parallel_for(0, int64_t(shares.size()), 1, [&](int64_t begin, int64_t end) {
    at::NoGradGuard no_graph;
    for (int64_t part = begin; part < end; part++) work(shares[part], part);
  });
}

// ---- a block

struct Block {
  Sizes sizes;
  const int64_t* starts;
  int64_t sequences, longest;
  const Dropout* dropout;  // null: none
  int64_t x_stride;        // from an expert's x to the next one's; 0 where all have the same
  std::vector<std::vector<Tile>> shares;
  int64_t rows;  // of the largest tile
};

// y (K, M, r) of x.
template <typename Value>
void forward(const Block& block, const RealOf<Value>* x, const Weights<Value>& w, const Kept<Value>& keep, RealOf<Value>* y) {
  using Real = RealOf<Value>;
  const auto& sizes = block.sizes;
  const int64_t r = sizes.width, f = sizes.inner, most = block.rows;
  const bool keeps = keep.qkv != nullptr;
  const Rights<Value> w_qkv(w.qkv, sizes.experts, r, 3 * r, false), w_out(w.out, sizes.experts, r, r, false),
      w1(w.w1, sizes.experts, r, f, false), w2(w.w2, sizes.experts, f, r, false);
  run(block.shares, [&](const std::vector<Tile>& tiles, int64_t) {
    Worker<Value> worker(sizes, block.dropout, block.starts, block.longest);
    // In Real what is added or normalised, in Value what is multiplied or kept.
    Room<Real> now(most * r), branch(most * r), inner(most * f);
    Room<Value> qkv(most * 3 * r), mixed(most * r), hidden(most * f), activated(most * f), value(most * r);
    for (const auto& tile : tiles) {
      const int64_t first = block.starts[tile.first], n = block.starts[tile.last] - first, k = tile.expert;
      const int64_t at = k * sizes.tokens + first;
      const Real* in = x + k * block.x_stride + first * r;
      Value* own_qkv = keeps ? keep.qkv + at * 3 * r : qkv.data();
      Value* own_mixed = keeps ? keep.mixed + at * r : mixed.data();
      Value* own_hidden = keeps ? keep.hidden + at * f : hidden.data();
      w_qkv[k].times(n, as_value(in, n * r, value), own_qkv);
      worker.attend(tile, own_qkv, own_mixed, keeps ? keep.log_sum + at * sizes.heads : nullptr);
      w_out[k].times(n, own_mixed, branch.data());
      Value* now_value = same_or<Value>(now.data(), value);
      worker.residual_norm(0, tile, n, in, branch.data(), nullptr, w.scale1 + k * r, w.shift1 + k * r, now.data(), now_value,
                           keeps ? keep.normed1 + at * r : nullptr, keeps ? keep.deviation1 + at : nullptr);
      w1[k].times(n, now_value, inner.data());
      worker.gelu(n, inner.data(), w.b1 + k * f, own_hidden, activated.data());
      w2[k].times(n, activated.data(), branch.data());
      worker.residual_norm(1, tile, n, now.data(), branch.data(), w.b2 + k * r, w.scale2 + k * r, w.shift2 + k * r, y + at * r,
                           static_cast<Value*>(nullptr), keeps ? keep.normed2 + at * r : nullptr,
                           keeps ? keep.deviation2 + at : nullptr);
    }
  });
}

// From gradient (K, M, r) that of x for each expert (K, M, r) and, added to `sums`, those of the weights.
template <typename Value>
void backward(const Block& block, const RealOf<Value>* x, const Weights<Value>& w, const Kept<Value>& keep,
              const RealOf<Value>* gradient, RealOf<Value>* x_gradient, std::vector<Tensor>& sums) {
  using Real = RealOf<Value>;
  const auto& sizes = block.sizes;
  const int64_t r = sizes.width, f = sizes.inner, most = block.rows;
  // The first part that has tiles of an expert adds to the sums themselves; what others have of it is added afterwards, in order.
  std::vector<int64_t> owner(sizes.experts, -1), shared(block.shares.size(), -1);
  for (size_t part = 0; part < block.shares.size(); part++)
    for (const auto& tile : block.shares[part]) {
      if (owner[tile.expert] < 0) owner[tile.expert] = part;
      if (owner[tile.expert] != int64_t(part)) shared[part] = tile.expert;  // only a part's first expert can be another's
    }
  std::vector<std::vector<Tensor>> own_sums(block.shares.size());
  const Rights<Value> qkv_back(w.qkv, sizes.experts, 3 * r, r, true), out_back(w.out, sizes.experts, r, r, true),
      w1_back(w.w1, sizes.experts, f, r, true), w2_back(w.w2, sizes.experts, r, f, true);
  run(block.shares, [&](const std::vector<Tile>& tiles, int64_t part) {
    Worker<Value> worker(sizes, block.dropout, block.starts, block.longest);
    Room<Real> slope(most * f), inner_gradient(most * f), qkv_gradient(most * 3 * r);
    Room<Value> branch(most * r), activated(most * f), room(most * f), value(most * r), wide(most * 3 * r);
    auto outer = [&](int64_t m, int64_t columns, int64_t k, const Value* a, const Value* b, Real* sum) {
      add_outer(m, columns, k, a, m, b, columns, sum, columns, worker.scratch);
    };
    if (shared[part] >= 0)
      for (const auto& sum : sums) own_sums[part].push_back(at::zeros_like(sum[0]));
    for (const auto& tile : tiles) {
      const int64_t first = block.starts[tile.first], n = block.starts[tile.last] - first, k = tile.expert;
      const int64_t at = k * sizes.tokens + first;
      auto sum = [&](int j) {
        return owner[k] == part ? sums[j].template data_ptr<Real>() + k * sums[j].stride(0)
                                : own_sums[part][j].template data_ptr<Real>();
      };
      Real* now = x_gradient + at * r;
      std::copy(gradient + at * r, gradient + (at + n) * r, now);
      worker.residual_norm_backward(1, tile, n, keep.normed2 + at * r, keep.deviation2 + at, w.scale2 + k * r, now, branch.data(),
                                    sum(5), sum(8), sum(9));
      worker.gelu_again(n, keep.hidden + at * f, activated.data(), slope.data());
      outer(f, r, n, activated.data(), branch.data(), sum(3));
      w2_back[k].times(n, branch.data(), inner_gradient.data());
      Value* inner = same_or<Value>(inner_gradient.data(), room);
      worker.sloped(n, slope.data(), inner_gradient.data(), inner, sum(4));
      worker.renormed(n, keep.normed1 + at * r, w.scale1 + k * r, w.shift1 + k * r, value.data());
      outer(r, f, n, value.data(), inner, sum(2));
      w1_back[k].template times<true>(n, inner, now);
      worker.residual_norm_backward(0, tile, n, keep.normed1 + at * r, keep.deviation1 + at, w.scale1 + k * r, now, branch.data(),
                                    nullptr, sum(6), sum(7));
      outer(r, r, n, keep.mixed + at * r, branch.data(), sum(1));
      out_back[k].times(n, branch.data(), value.data());
      worker.attend_backward(tile, keep.qkv + at * 3 * r, keep.mixed + at * r, keep.log_sum + at * sizes.heads, value.data(),
                             qkv_gradient.data());
      const Value* wide_gradient = as_value(qkv_gradient.data(), n * 3 * r, wide);
      outer(r, 3 * r, n, as_value(x + k * block.x_stride + first * r, n * r, value), wide_gradient, sum(0));
      qkv_back[k].template times<true>(n, wide_gradient, now);
    }
  });
  for (size_t part = 0; part < own_sums.size(); part++)
    for (size_t i = 0; i < own_sums[part].size(); i++) sums[i][shared[part]].add_(own_sums[part][i]);
}

// ---- what PyTorch calls

struct Call {  // the arguments that forward and backward share, checked
  Tensor x, starts;
  std::vector<Tensor> weights;  // the matrices as they are multiplied
  Dropout dropout;
  Block block;
  at::ScalarType real, value;

  Call(const Tensor& given, const Tensor& given_starts, at::TensorList given_weights, int64_t heads, double share, int64_t seed,
       bool half, int64_t rows)
      : x(given), starts(given_starts.contiguous()), real(given.scalar_type()), value(real) {
    TORCH_CHECK(x.dim() == 3 && (real == at::kDouble || real == at::kFloat), "x: (K, M, r), float or double");
    TORCH_CHECK(!half || real == at::kFloat, "bfloat16 goes with float");
    TORCH_CHECK(starts.dim() == 1 && starts.scalar_type() == at::kLong && starts.numel() > 0, "starts: (S + 1), int64");
    TORCH_CHECK(given_weights.size() == kWeights, "weights: ", kWeights);
    const int64_t k = x.size(0), m = x.size(1), r = x.size(2), f = given_weights[2].size(-1);
    TORCH_CHECK(heads > 0 && r % heads == 0, "heads: a divisor of r");
    // Two neighbours are multiplied at once. Without such products fp32 is as fast, and nearer.
    if (half && SYNCREC_BF16 && f % 2 == 0 && r / heads % 2 == 0) value = at::kBFloat16;
    if (x.stride(2) != 1 || x.stride(1) != r) x = x.contiguous();
    const std::vector<std::vector<int64_t>> shapes = {{k, r, 3 * r}, {k, r, r}, {k, r, f}, {k, f, r}, {k, 1, f},
                                                      {k, 1, r},     {k, 1, r}, {k, 1, r}, {k, 1, r}, {k, 1, r}};
    for (int j = 0; j < kWeights; j++) {
      const auto& weight = given_weights[j];
      TORCH_CHECK(weight.sizes() == at::IntArrayRef(shapes[j]) && weight.scalar_type() == real, "weight ", j, " is ", weight.sizes(),
                  " of ", weight.scalar_type());
      weights.push_back(weight.to(j < 4 ? value : real).contiguous());
    }
    const auto* bounds = starts.const_data_ptr<int64_t>();
    const int64_t sequences = starts.numel() - 1;
    for (int64_t s = 0; s < sequences; s++) TORCH_CHECK(bounds[s] <= bounds[s + 1], "starts must not fall");
    TORCH_CHECK(bounds[0] == 0 && bounds[sequences] == m, "starts: 0 … M");
    const auto dropped = uint32_t(std::lround(share * 65536));
    dropout = {dropped, dropped < 65536 ? float(65536.0 / (65536 - dropped)) : 0.0f, uint64_t(seed)};
    auto shares = share_out(bounds, sequences, k, at::get_num_threads(), rows);
    const int64_t most = largest(shares, bounds);
    block = {{k, m, r, f, heads}, bounds, sequences, longest(bounds, sequences), nullptr, k > 1 ? x.stride(0) : 0,
             std::move(shares), most};
  }

  const Block& ready() {
    block.dropout = dropout.dropped ? &dropout : nullptr;
    return block;
  }

  template <typename Value>
  Weights<Value> read() const {
    using Real = RealOf<Value>;
    auto v = [&](int j) { return weights[j].const_data_ptr<Value>(); };
    auto w = [&](int j) { return weights[j].const_data_ptr<Real>(); };
    return {v(0), v(1), v(2), v(3), w(4), w(5), w(6), w(7), w(8), w(9)};
  }

  template <typename Compute>
  void dispatch(const Compute& compute) const {
#if SYNCREC_BF16
    if (value == at::kBFloat16) return compute(BFloat16());
#endif
    if (value == at::kDouble) compute(double());
    else compute(float());
  }
};

template <typename Value>
Kept<Value> read_kept(at::TensorList kept) {
  using Real = RealOf<Value>;
  if (kept.empty()) return {};
  auto v = [&](int j) { return kept[j].data_ptr<Value>(); };
  auto w = [&](int j) { return kept[j].data_ptr<Real>(); };
  return {v(0), v(1), v(2), v(3), v(4), w(5), w(6), w(7)};
}

// y (K, M, r), and what backward needs where `keep`.
std::vector<Tensor> block_forward(const Tensor& x, const Tensor& starts, at::TensorList weights, int64_t heads, double share,
                                  int64_t seed, bool half, bool keep, int64_t rows) {
  Call call(x, starts, weights, heads, share, seed, half, rows);
  const auto& s = call.block.sizes;
  std::vector<Tensor> kept;
  auto empty = [&](int64_t width, at::ScalarType type) { return at::empty({s.experts, s.tokens, width}, x.options().dtype(type)); };
  if (keep) {
    for (int64_t width : {3 * s.width, s.width, s.width, s.inner, s.width}) kept.push_back(empty(width, call.value));
    for (int64_t width : {s.heads, int64_t(1), int64_t(1)}) kept.push_back(empty(width, call.real));
  }
  auto y = empty(s.width, call.real);
  call.dispatch([&](auto zero) {
    using Value = decltype(zero);
    using Real = RealOf<Value>;
    forward<Value>(call.ready(), call.x.const_data_ptr<Real>(), call.read<Value>(), read_kept<Value>(kept), y.data_ptr<Real>());
  });
  kept.insert(kept.begin(), y);
  return kept;
}

// The gradients of x, for each expert its own (K, M, r), and of the weights.
std::vector<Tensor> block_backward(const Tensor& gradient, const Tensor& x, const Tensor& starts, at::TensorList weights,
                                   at::TensorList kept, int64_t heads, double share, int64_t seed, bool half, int64_t rows) {
  Call call(x, starts, weights, heads, share, seed, half, rows);
  TORCH_CHECK(kept.size() == kKept && gradient.sizes() == x.sizes(), "kept: ", kKept, "; gradient: (K, M, r)");
  const auto given = gradient.to(call.real).contiguous();
  auto x_gradient = at::empty_like(given);
  std::vector<Tensor> sums;
  for (const auto& weight : weights) sums.push_back(at::zeros(weight.sizes(), weight.options()));
  call.dispatch([&](auto zero) {
    using Value = decltype(zero);
    using Real = RealOf<Value>;
    backward<Value>(call.ready(), call.x.const_data_ptr<Real>(), call.read<Value>(), read_kept<Value>(kept),
                    given.const_data_ptr<Real>(), x_gradient.data_ptr<Real>(), sums);
  });
  sums.insert(sums.begin(), x_gradient);
  return sums;
}

}  // namespace

TORCH_LIBRARY(syncrec, library) {
  library.def(
      "block_forward(Tensor x, Tensor starts, Tensor[] weights, int heads, float share, int seed, bool half, bool keep, int rows) "
      "-> Tensor[]",
      &block_forward);
  library.def(
      "block_backward(Tensor gradient, Tensor x, Tensor starts, Tensor[] weights, Tensor[] kept, int heads, float share, int seed, "
      "bool half, int rows) -> Tensor[]",
      &block_backward);
}
