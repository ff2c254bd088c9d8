// Matrix products on one core, for tiles of some hundred rows: Right::times and add_outer.
//
// With AVX-512 our own, in registers of 12 rows and 32 columns: for such tiles a BLAS call spends a third of its time on copying
// and scaling, and oneDNN's bfloat16 rounds every result, also where a sum in fp32 is wanted. double, the type that everything
// else is tested against, and processors without AVX-512 take the BLAS that libtorch exports.
//
// Matrices are row-major, each with the distance between its rows (…_step, in elements). A unit is what one multiplication takes
// of a row: a float, or two bfloat16 neighbours along k in 32 bits (vdpbf16ps multiplies both and sums in fp32). Panels of a
// matrix (k, n): (n / 32, k units, 32) units, columns and k filled up with zeros.

#pragma once

#include <c10/util/BFloat16.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#include <immintrin.h>
#define SYNCREC_AVX512 1
#else
#define SYNCREC_AVX512 0
#endif
#if SYNCREC_AVX512 && defined(__AVX512BF16__)
#define SYNCREC_BF16 1
#else
#define SYNCREC_BF16 0
#endif

extern "C" {
void sgemm_(const char*, const char*, const int*, const int*, const int*, const float*, const float*, const int*, const float*,
            const int*, const float*, float*, const int*);
void dgemm_(const char*, const char*, const int*, const int*, const int*, const double*, const double*, const int*,
            const double*, const int*, const double*, double*, const int*);
}

namespace products {

using c10::BFloat16;

constexpr int64_t kPanel = 32;
constexpr int kRows = 12;

// ---- by BLAS: out = op(a) op(b), or added to it; (m, k) (k, n)

inline void blas(bool ta, bool tb, int m, int n, int k, const float* a, int a_step, const float* b, int b_step, bool add, float* out,
                 int out_step) {
  const float one = 1, before = add;
  sgemm_(tb ? "T" : "N", ta ? "T" : "N", &n, &m, &k, &one, b, &b_step, a, &a_step, &before, out, &out_step);
}
inline void blas(bool ta, bool tb, int m, int n, int k, const double* a, int a_step, const double* b, int b_step, bool add,
                 double* out, int out_step) {
  const double one = 1, before = add;
  dgemm_(tb ? "T" : "N", ta ? "T" : "N", &n, &m, &k, &one, b, &b_step, a, &a_step, &before, out, &out_step);
}

template <typename Value>
constexpr bool kOwn = SYNCREC_AVX512 && (std::is_same_v<Value, float> || std::is_same_v<Value, BFloat16>);
template <typename Value>
constexpr int64_t kUnit = std::is_same_v<Value, BFloat16> ? 2 : 1;  // elements

template <typename Value>
int64_t units(int64_t k) {
  return (k + kUnit<Value> - 1) / kUnit<Value>;
}
template <typename Value>
int64_t panels_size(int64_t k, int64_t n) {
  return kOwn<Value> ? (n + kPanel - 1) / kPanel * kPanel * units<Value>(k) : 0;
}

// ---- our own

#if SYNCREC_AVX512

using Unit = uint32_t;

inline __mmask32 first(int64_t columns) { return columns >= kPanel ? ~__mmask32(0) : (__mmask32(1) << columns) - 1; }

inline void pack(int64_t k, int64_t n, const float* b, int64_t b_step, Unit* panels) {
  for (int64_t column = 0; column < n; column += kPanel) {
    const __mmask32 mask = first(n - column);
    for (int64_t i = 0; i < k; i++, panels += kPanel) {
      _mm512_storeu_si512(panels, _mm512_maskz_loadu_epi32(mask & 0xffff, b + i * b_step + column));
      _mm512_storeu_si512(panels + 16, _mm512_maskz_loadu_epi32(mask >> 16, b + i * b_step + column + 16));
    }
  }
}

inline void pack(int64_t k, int64_t n, const BFloat16* b, int64_t b_step, Unit* panels) {
  const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5, 36, 4,
                                       35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  for (int64_t column = 0; column < n; column += kPanel) {
    const __mmask32 mask = first(n - column);
    for (int64_t i = 0; i < k; i += 2, panels += kPanel) {
      const BFloat16* row = b + i * b_step + column;
      const __m512i one = _mm512_maskz_loadu_epi16(mask, row);
      const __m512i other = i + 1 < k ? _mm512_maskz_loadu_epi16(mask, row + b_step) : _mm512_setzero_si512();
      _mm512_storeu_si512(panels, _mm512_permutex2var_epi16(one, low, other));
      _mm512_storeu_si512(panels + 16, _mm512_permutex2var_epi16(one, high, other));
    }
  }
}

// Rows of 16 units become columns.
inline void transpose(__m512i row[16]) {
  __m512i by_two[16], by_four[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    by_two[i] = _mm512_unpacklo_epi32(row[i], row[i + 1]);
    by_two[i + 1] = _mm512_unpackhi_epi32(row[i], row[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {  // of each quarter of a register: its columns 0, 1, 2, 3, of four rows
    by_four[i] = _mm512_unpacklo_epi64(by_two[i], by_two[i + 2]);
    by_four[i + 1] = _mm512_unpackhi_epi64(by_two[i], by_two[i + 2]);
    by_four[i + 2] = _mm512_unpacklo_epi64(by_two[i + 1], by_two[i + 3]);
    by_four[i + 3] = _mm512_unpackhi_epi64(by_two[i + 1], by_two[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    const __m512i even0 = _mm512_shuffle_i32x4(by_four[i], by_four[4 + i], 0x88);  // quarters 0 and 2 of both
    const __m512i odd0 = _mm512_shuffle_i32x4(by_four[i], by_four[4 + i], 0xdd);
    const __m512i even1 = _mm512_shuffle_i32x4(by_four[8 + i], by_four[12 + i], 0x88);
    const __m512i odd1 = _mm512_shuffle_i32x4(by_four[8 + i], by_four[12 + i], 0xdd);
    row[i] = _mm512_shuffle_i32x4(even0, even1, 0x88);
    row[8 + i] = _mm512_shuffle_i32x4(even0, even1, 0xdd);
    row[4 + i] = _mm512_shuffle_i32x4(odd0, odd1, 0x88);
    row[12 + i] = _mm512_shuffle_i32x4(odd0, odd1, 0xdd);
  }
}

// Panels of bᵀ; b is (n, k), k whole units, its row c at row_of(c).
template <typename Value, typename RowOf>
void pack_rows(int64_t k, int64_t n, const RowOf& row_of, Unit* panels) {
  const int64_t count = k / kUnit<Value>;
  for (int64_t column = 0; column < n; column += kPanel, panels += count * kPanel)
    for (int64_t half = 0; half < kPanel; half += 16)
      for (int64_t i = 0; i < count; i += 16) {
        const int64_t here = std::min<int64_t>(16, count - i);
        __m512i row[16];
#pragma GCC unroll 16
        for (int64_t c = 0; c < 16; c++) {
          const int64_t at = column + half + c;
          row[c] = at < n ? _mm512_maskz_loadu_epi32((1u << here) - 1, row_of(at) + i * kUnit<Value>) : _mm512_setzero_si512();
        }
        transpose(row);
        for (int64_t j = 0; j < here; j++) _mm512_storeu_si512(panels + (i + j) * kPanel + half, row[j]);
      }
}

template <typename Value>
inline __m512 multiply_add(__m512 sum, __m512i a, __m512i b) {
#if SYNCREC_BF16
  if constexpr (std::is_same_v<Value, BFloat16>) return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
#endif
  return _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), sum);
}

inline void store(float* out, __mmask16 mask, __m512 values) { _mm512_mask_storeu_ps(out, mask, values); }
#if SYNCREC_BF16
inline void store(BFloat16* out, __mmask16 mask, __m512 values) {
  _mm256_mask_storeu_epi16(out, mask, (__m256i)_mm512_cvtneps_pbh(values));
}
#endif

// sum = kCount rows of a and the 32 columns of a panel, multiplied. a: row i's unit p at a[i * row_step + p * unit_step].
template <typename Value, int kCount>
[[gnu::always_inline]] inline void multiply(int64_t count, const Unit* a, int64_t row_step, int64_t unit_step, const Unit* panel,
                                            __m512 (&sum)[kCount][2]) {
#pragma GCC unroll 16
  for (int i = 0; i < kCount; i++) sum[i][0] = sum[i][1] = _mm512_setzero_ps();
  for (int64_t p = 0; p < count; p++) {
    const __m512i b0 = _mm512_loadu_si512(panel + p * kPanel), b1 = _mm512_loadu_si512(panel + p * kPanel + 16);
#pragma GCC unroll 16
    for (int i = 0; i < kCount; i++) {
      const __m512i unit = _mm512_set1_epi32(a[i * row_step + p * unit_step]);
      sum[i][0] = multiply_add<Value>(sum[i][0], unit, b0);
      sum[i][1] = multiply_add<Value>(sum[i][1], unit, b1);
    }
  }
}

// kCount rows and up to 32 columns of out.
template <typename Value, int kCount, bool kAdd, typename Out>
inline void block(int64_t count, const Unit* a, int64_t row_step, int64_t unit_step, const Unit* panel, Out* out, int64_t out_step,
                  __mmask32 mask) {
  const __mmask16 left = mask & 0xffff, right = mask >> 16;
  __m512 sum[kCount][2];
  multiply<Value>(count, a, row_step, unit_step, panel, sum);
#pragma GCC unroll 16
  for (int i = 0; i < kCount; i++) {
    Out* to = out + i * out_step;
    if constexpr (kAdd) {
      sum[i][0] = _mm512_add_ps(sum[i][0], _mm512_maskz_loadu_ps(left, to));
      sum[i][1] = _mm512_add_ps(sum[i][1], _mm512_maskz_loadu_ps(right, to + 16));
    }
    store(to, left, sum[i][0]);
    store(to + 16, right, sum[i][1]);
  }
}

template <typename Value, bool kAdd, typename Out>
inline void rows(int64_t m, int64_t count, const Unit* a, int64_t row_step, int64_t unit_step, const Unit* panel, Out* out,
                 int64_t out_step, __mmask32 mask) {
  switch (m) {
#define SYNCREC_CASE(n) \
  case n: return block<Value, n, kAdd>(count, a, row_step, unit_step, panel, out, out_step, mask);
    SYNCREC_CASE(1) SYNCREC_CASE(2) SYNCREC_CASE(3) SYNCREC_CASE(4) SYNCREC_CASE(5) SYNCREC_CASE(6) SYNCREC_CASE(7)
    SYNCREC_CASE(8) SYNCREC_CASE(9) SYNCREC_CASE(10) SYNCREC_CASE(11) SYNCREC_CASE(12)
#undef SYNCREC_CASE
  }
}

#endif

// ---- what is called

// The right factor b (k, n) of products, ready for many of them. Given transposed it is (n, k) in memory. In bfloat16 k is even
// where b is transposed, and a's rows have an even distance and zeros up to an even k.
template <typename Value>
struct Right {
  const Value* data;
  int64_t step, k, n;
  bool transposed;
  const uint32_t* panels;

  // room: panels_size<Value>(k, n) units that outlive this.
  Right(const Value* data, int64_t step, int64_t k, int64_t n, bool transposed, uint32_t* room)
      : data(data), step(step), k(k), n(n), transposed(transposed), panels(room) {
#if SYNCREC_AVX512
    if constexpr (kOwn<Value>) {
      if (transposed) pack_rows<Value>(k, n, [=](int64_t row) { return data + row * step; }, room);
      else pack(k, n, data, step, room);
    }
#endif
  }

  // out (m, columns) = a b, or added to it, of b's first `depth` rows and `columns` columns; a: (m, depth).
  template <bool kAdd = false, typename Out>
  void times(int64_t m, const Value* a, int64_t a_step, Out* out, int64_t out_step, int64_t depth, int64_t columns) const {
    if constexpr (!kOwn<Value>) {
      blas(false, transposed, m, columns, depth, a, a_step, data, step, kAdd, out, out_step);
    } else {
#if SYNCREC_AVX512
      const auto* own = reinterpret_cast<const Unit*>(a);
      const int64_t own_step = a_step / kUnit<Value>, of_panel = units<Value>(k);
      for (int64_t row = 0; row < m; row += kRows)  // a's rows stay in L1 while the panels pass
        for (int64_t column = 0; column < columns; column += kPanel)
          rows<Value, kAdd>(std::min<int64_t>(kRows, m - row), units<Value>(depth), own + row * own_step, own_step, 1,
                            panels + column * of_panel, out + row * out_step + column, out_step, first(columns - column));
#endif
    }
  }
  template <bool kAdd = false, typename Out>
  void times(int64_t m, const Value* a, Out* out) const {
    times<kAdd>(m, a, k, out, n, k, n);
  }
};

// out (m, n) += aᵀ b, or aᵀ b alone, with a (k, m) and b (k, n). `room` grows as it has to.
template <bool kAdd = true, typename Value, typename Real>
void add_outer(int64_t m, int64_t n, int64_t k, const Value* a, int64_t a_step, const Value* b, int64_t b_step, Real* out,
               int64_t out_step, std::vector<uint32_t>& room) {
  if constexpr (!kOwn<Value>) {
    blas(true, false, m, n, k, a, a_step, b, b_step, kAdd, out, out_step);
  } else {
#if SYNCREC_AVX512
    const int64_t of_a = panels_size<Value>(k, m), count = units<Value>(k);
    room.resize(std::max<int64_t>(room.size(), of_a + panels_size<Value>(k, n)));
    Unit *left = room.data(), *right = left + of_a;
    pack(k, m, a, a_step, left);
    pack(k, n, b, b_step, right);
    for (int64_t panel = 0; panel < m; panel += kPanel)
      for (int64_t row = panel; row < std::min(m, panel + kPanel); row += kRows)
        for (int64_t column = 0; column < n; column += kPanel)
          rows<Value, kAdd>(std::min<int64_t>(kRows, std::min(m, panel + kPanel) - row), count, left + panel * count + row - panel, 1,
                            kPanel, right + column * count, out + row * out_step + column, out_step, first(n - column));
#endif
  }
}

}  // namespace products
