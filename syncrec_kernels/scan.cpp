// Exact ranking on a CPU with AVX-512 (embeddings/topk/cpu_scan.py): users are multiplied with items and compared while the sums are in
// registers, so that no score goes through memory.
//
// A product of float32 numbers is no further from the score of its pair than the error that embeddings/topk/bounds.py gives for any
// order of summation. What that leaves open is scored here as it is there, exactly; with a wild item a product is no number,
// and so always open. Users are tame.
//
// Items come in panels (items / 32, r, 32), filled up with zeros: `pack`. Pairs that are not to be shown come by column.

#if !defined(__AVX512F__) || !defined(__AVX512BW__) || !defined(__AVX512VL__)
#error the processor has no AVX-512
#endif

#include <torch/library.h>
#include <ATen/ATen.h>

#include <bit>
#include <cmath>
#include <limits>
#include <numeric>

#include "products.h"

namespace {

using at::Tensor;
using products::kPanel;
using products::kRows;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int64_t kNear = 1 << 17;  // numbers of users' vectors that stay in a core's L2 cache while items pass

// As in embeddings/topk/bounds.py.
constexpr float kTame = 0x1p60f;
float below(double value) { return std::nextafter(float(value), -kInfinity); }
float counted(float score) { return std::isnan(score) ? -kInfinity : score; }  // among the best

// The float32 vectors of one side, one a row.
struct Rows {
  const float* data;
  int64_t step, count, dim;

  explicit Rows(const Tensor& given)
      : data(given.const_data_ptr<float>()), step(given.stride(0)), count(given.size(0)), dim(given.size(1)) {
    TORCH_CHECK(given.stride(1) == 1, "vectors lie one after the other");
  }
  const float* operator[](int64_t row) const { return data + row * step; }
};

// The score of a pair: products and sums in float64, summed in halves, rounded. float64 holds a product of two float32
// numbers exactly, so it makes no difference whether the compiler fuses it with the sum.
struct Exact {
  std::vector<double> terms;

  float operator()(const float* one, const float* other, int64_t width) {
    terms.resize(width);
    for (int64_t i = 0; i < width; i++) terms[i] = double(one[i]) * double(other[i]);
    while (width > 1) {
      const int64_t half = width / 2;
      for (int64_t i = 0; i < half; i++) terms[i] += terms[half + i];
      if (width % 2) terms[0] += terms[width - 1];
      width = half;
    }
    return terms[0];
  }
};

struct Items {
  const uint32_t* panels;
  const int64_t* place;  // of each, in the shard
  int64_t count;
  Rows shard;

  Items(const Tensor& panels, const Tensor& place, const Tensor& weight)
      : panels(reinterpret_cast<const uint32_t*>(panels.const_data_ptr<float>())), place(place.const_data_ptr<int64_t>()),
        count(place.numel()), shard(weight) {
    TORCH_CHECK(panels.numel() == (count + kPanel - 1) / kPanel * shard.dim * kPanel, "panels: as packed");
    TORCH_CHECK(panels.is_contiguous() && place.is_contiguous(), "panels and places lie one after the other");
  }
  const float* operator[](int64_t column) const { return shard[place[column]]; }
};

// Pairs that are not to be shown, columns ascending.
struct Hidden {
  const int64_t *user, *column;
  int64_t count;

  Hidden(const Tensor& user, const Tensor& column)
      : user(user.const_data_ptr<int64_t>()), column(column.const_data_ptr<int64_t>()), count(user.numel()) {
    TORCH_CHECK(user.is_contiguous() && column.is_contiguous() && column.numel() == count, "hidden: pairs");
  }
};

// viewer.see(sums, first user, first column, shown): kCount users and 32 columns; shown: of each user the columns that count.
template <int kCount, typename Viewer>
void tile(const Rows& users, int64_t user, const uint32_t* panel, int64_t column, uint32_t items, const uint32_t* hidden,
          Viewer& viewer) {
  __m512 sum[kCount][2];
  products::multiply<float>(users.dim, reinterpret_cast<const uint32_t*>(users[user]), users.step, 1, panel, sum);
  viewer.see(sum, user, column, [=](int i) { return items & ~hidden[user + i]; });
}

template <typename Viewer>
void scan(const Items& items, const Rows& users, const Hidden& pairs, Viewer& viewer) {
  TORCH_CHECK(users.dim == items.shard.dim, "users and items have as many dimensions");
  std::vector<uint32_t> hidden(users.count, 0);
  const int64_t near = std::max<int64_t>(1, kNear / users.dim / kRows) * kRows;
  for (int64_t begin = 0; begin < users.count; begin += near) {
    const int64_t end = std::min(users.count, begin + near);
    int64_t pair = 0, cleared = 0;
    for (int64_t column = 0; column < items.count; column += kPanel) {
      for (; pair < pairs.count && pairs.column[pair] < column + kPanel; pair++)
        hidden[pairs.user[pair]] |= 1u << (pairs.column[pair] - column);
      const uint32_t* panel = items.panels + column * users.dim;
      const uint32_t there = products::first(items.count - column);
      for (int64_t user = begin; user < end; user += kRows) switch (std::min<int64_t>(kRows, end - user)) {
#define CASE(n) \
  case n: tile<n>(users, user, panel, column, there, hidden.data(), viewer); break;
          CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#undef CASE
        }
      for (; cleared < pair; cleared++) hidden[pairs.user[cleared]] = 0;
    }
  }
}

template <int kHow>
uint32_t compare(const __m512 (&sum)[2], __m512 with) {
  return _mm512_cmp_ps_mask(sum[0], with, kHow) | uint32_t(_mm512_cmp_ps_mask(sum[1], with, kHow)) << 16;
}

// ---- the best k

// What may be among the best of each user, in the order of rows: at most `room` with their products, or scores.
struct Best {
  int64_t k, room;
  const Items& items;
  const Rows& users;
  const double *error, *most_error;  // of a product of these items, and of any that is held
  const bool* nowhere;               // all items have the same score, unless it is no number
  int32_t* places;
  float* products;
  int32_t* counts;
  float* least;  // what the k-th best has at least
  std::vector<float> cutoffs, sorted;
  std::vector<int32_t> order;
  Exact exact;

  void begin() {
    cutoffs.resize(users.count);
    for (int64_t user = 0; user < users.count; user++) cutoffs[user] = cutoff(user);
  }

  // The least product with which an item may be one of the best.
  float cutoff(int64_t user) const {
    // Rows come in order: once there are k, no equal one comes before them.
    if (nowhere[user] && least[user] > -kInfinity) return std::nextafter(least[user], kInfinity);
    return below(least[user] - error[user]);
  }

  template <int kCount, typename Shown>
  [[gnu::always_inline]] void see(__m512 (&sum)[kCount][2], int64_t user, int64_t column, const Shown& shown) {
    uint32_t good[kCount], any = 0;
#pragma GCC unroll 16
    for (int i = 0; i < kCount; i++) {
      any |= good[i] = compare<_CMP_NLT_UQ>(sum[i], _mm512_set1_ps(cutoffs[user + i]));
    }
    if (!any) return;
    alignas(64) float product[kCount][kPanel];
#pragma GCC unroll 16
    for (int i = 0; i < kCount; i++) {
      _mm512_store_ps(product[i], sum[i][0]);
      _mm512_store_ps(product[i] + 16, sum[i][1]);
    }
    for (int i = 0; i < kCount; i++)
      for (uint32_t left = good[i] & shown(i); left; left &= left - 1) {
        const int at = std::countr_zero(left);
        take(user + i, column + at, product[i][at]);
      }
  }

  void take(int64_t user, int64_t column, float product) {
    if (counts[user] == room) {
      settle(user);
      cutoffs[user] = cutoff(user);
    }
    if (product < cutoffs[user]) return;  // it has risen since
    const int64_t at = user * room + counts[user]++;
    places[at] = int32_t(items.place[column]);
    products[at] = product;
  }

  // Leaves out what cannot be among the best any more. There are at least k.
  void settle(int64_t user) {
    const float* own = products + user * room;
    sorted.resize(counts[user]);
    std::transform(own, own + counts[user], sorted.begin(), counted);
    std::nth_element(sorted.begin(), sorted.begin() + k - 1, sorted.end(), std::greater<float>());
    if (!nowhere[user]) {
      least[user] = std::max(least[user], below(sorted[k - 1] - most_error[user]));
      const float cutoff = below(least[user] - most_error[user]);
      keep(user, [&](int64_t i) { return !(own[i] < cutoff); });
    }
    if (counts[user] > (k + room) / 2) settle_exactly(user);  // they are too near each other
  }

  // Leaves the best k, with their scores.
  void settle_exactly(int64_t user) {
    float* own = products + user * room;
    for (int64_t i = 0; i < counts[user]; i++)
      own[i] = counted(exact(users[user], items.shard[uint32_t(places[user * room + i])], users.dim));
    if (counts[user] < k) return;
    order.resize(counts[user]);
    std::iota(order.begin(), order.end(), 0);
    const auto last = order.begin() + k - 1;
    auto before = [&](int32_t one, int32_t other) { return own[one] > own[other] || (own[one] == own[other] && one < other); };
    std::nth_element(order.begin(), last, order.end(), before);
    const int32_t at = *last;
    const float score = own[at];
    keep(user, [&](int64_t i) { return own[i] > score || (own[i] == score && i <= at); });
    least[user] = std::max(least[user], score);
  }

  template <typename Keeps>
  void keep(int64_t user, const Keeps& keeps) {
    int32_t left = 0;
    const int64_t first = user * room;
    for (int64_t i = 0; i < counts[user]; i++)
      if (keeps(i)) {
        places[first + left] = places[first + i];
        products[first + left++] = products[first + i];
      }
    counts[user] = left;
  }
};

// ---- how many come before

struct Ahead {
  const Items& items;
  const Rows& users;
  const float *low, *high, *score;  // a product below `low` is surely of a lower score, one from `high` on of none lower
  int64_t* ahead;
  Exact exact;

  template <int kCount, typename Shown>
  [[gnu::always_inline]] void see(__m512 (&sum)[kCount][2], int64_t user, int64_t column, const Shown& shown) {
    uint32_t near[kCount], any = 0;
#pragma GCC unroll 16
    for (int i = 0; i < kCount; i++) {
      const __m512 from = _mm512_set1_ps(high[user + i]), under = _mm512_set1_ps(low[user + i]);
      const uint32_t surely = compare<_CMP_GE_OQ>(sum[i], from), maybe = compare<_CMP_NLT_UQ>(sum[i], under);
      ahead[user + i] += std::popcount(surely & shown(i));
      any |= near[i] = maybe & ~surely;
    }
    if (!any) return;
    for (int i = 0; i < kCount; i++)
      for (uint32_t left = near[i] & shown(i); left; left &= left - 1)
        ahead[user + i] += !(exact(users[user + i], items[column + std::countr_zero(left)], users.dim) < score[user + i]);
  }
};

// ---- what PyTorch calls

// Panels of the shard's rows at `place`, NaN for wild ones, and the length of the longest of the others, at least.
std::tuple<Tensor, double> pack(const Tensor& weight, const Tensor& place) {
  const Rows rows(weight);
  const int64_t count = place.numel(), dim = rows.dim;
  TORCH_CHECK(place.is_contiguous(), "place: one after the other");
  const auto* at = place.const_data_ptr<int64_t>();
  auto panels = at::empty({(count + kPanel - 1) / kPanel, dim, kPanel}, weight.options());
  auto* panel = panels.data_ptr<float>();
  products::pack_rows<float>(dim, count, [&](int64_t item) { return rows[at[item]]; }, reinterpret_cast<products::Unit*>(panel));
  const __m512 nan = _mm512_set1_ps(std::numeric_limits<float>::quiet_NaN());
  __m512 longest = _mm512_setzero_ps();
  for (int64_t first = 0; first < count; first += kPanel, panel += dim * kPanel)
    for (int64_t half = 0; half < kPanel; half += 16) {
      float* to = panel + half;
      __m512 squares = _mm512_setzero_ps();
      for (int64_t i = 0; i < dim; i++) {
        const __m512 values = _mm512_loadu_ps(to + i * kPanel);
        squares = _mm512_fmadd_ps(values, values, squares);
      }
      const __m512 length = _mm512_sqrt_ps(squares);
      const __mmask16 wild = _mm512_cmp_ps_mask(length, _mm512_set1_ps(kTame), _CMP_NLT_UQ);
      longest = _mm512_mask_max_ps(longest, ~wild, longest, length);
      if (wild)
        for (int64_t i = 0; i < dim; i++) _mm512_mask_storeu_ps(to + i * kPanel, wild, nan);
    }
  return {panels, 1.001 * double(_mm512_reduce_max_ps(longest)) + dim * 0x1p-60};
}

Best best_of(const Items& items, const Rows& users, const Tensor& error, const Tensor& most_error, const Tensor& nowhere,
             int64_t k, Tensor& places, Tensor& products, Tensor& counts, Tensor& least) {
  const int64_t room = places.size(1);
  for (const auto& tensor : {error, most_error, nowhere, places, products, counts, least})
    TORCH_CHECK(tensor.is_contiguous() && tensor.size(0) == users.count, "one for each user");
  TORCH_CHECK(k >= 1 && room >= 2 * k && products.size(1) == room, "room for 2 k");
  return {k,
          room,
          items,
          users,
          error.const_data_ptr<double>(),
          most_error.const_data_ptr<double>(),
          nowhere.const_data_ptr<bool>(),
          places.data_ptr<int32_t>(),
          products.data_ptr<float>(),
          counts.data_ptr<int32_t>(),
          least.data_ptr<float>()};
}

void best(const Tensor& panels, const Tensor& place, const Tensor& weight, const Tensor& y, const Tensor& hidden_user,
          const Tensor& hidden_column, const Tensor& error, const Tensor& most_error, const Tensor& nowhere, int64_t k,
          Tensor places, Tensor products, Tensor counts, Tensor least) {
  const Items items(panels, place, weight);
  const Rows users(y);
  auto viewer = best_of(items, users, error, most_error, nowhere, k, places, products, counts, least);
  viewer.begin();
  scan(items, users, Hidden(hidden_user, hidden_column), viewer);
}

// Leaves the best k of each user, with their scores, in the order of rows.
void settle(const Tensor& weight, const Tensor& y, const Tensor& most_error, const Tensor& nowhere, int64_t k, Tensor places,
            Tensor products, Tensor counts, Tensor least) {
  const Items items(at::empty({0, y.size(1), kPanel}, y.options()), at::empty({0}, y.options().dtype(at::kLong)), weight);
  const Rows users(y);
  auto viewer = best_of(items, users, most_error, most_error, nowhere, k, places, products, counts, least);
  for (int64_t user = 0; user < users.count; user++) {
    if (counts.data_ptr<int32_t>()[user] > k) viewer.settle(user);
    viewer.settle_exactly(user);
  }
}

void ahead(const Tensor& panels, const Tensor& place, const Tensor& weight, const Tensor& y, const Tensor& hidden_user,
           const Tensor& hidden_column, const Tensor& low, const Tensor& high, const Tensor& score, Tensor ahead) {
  const Items items(panels, place, weight);
  const Rows users(y);
  for (const auto& tensor : {low, high, score, ahead})
    TORCH_CHECK(tensor.is_contiguous() && tensor.numel() == users.count, "one for each user");
  Ahead viewer{items,
               users,
               low.const_data_ptr<float>(),
               high.const_data_ptr<float>(),
               score.const_data_ptr<float>(),
               ahead.data_ptr<int64_t>()};
  scan(items, users, Hidden(hidden_user, hidden_column), viewer);
}

}  // namespace

TORCH_LIBRARY(scan, library) {
  library.def("pack(Tensor weight, Tensor place) -> (Tensor, float)", &pack);
  library.def(
      "best(Tensor panels, Tensor place, Tensor weight, Tensor y, Tensor hidden_user, Tensor hidden_column, Tensor error, "
      "Tensor most_error, Tensor nowhere, int k, Tensor(a!) places, Tensor(b!) products, Tensor(c!) counts, Tensor(d!) least) "
      "-> ()",
      &best);
  library.def(
      "settle(Tensor weight, Tensor y, Tensor most_error, Tensor nowhere, int k, Tensor(a!) places, Tensor(b!) products, "
      "Tensor(c!) counts, Tensor(d!) least) -> ()",
      &settle);
  library.def(
      "ahead(Tensor panels, Tensor place, Tensor weight, Tensor y, Tensor hidden_user, Tensor hidden_column, Tensor low, "
      "Tensor high, Tensor score, Tensor(a!) ahead) -> ()",
      &ahead);
}
