// A batch from decoded blocks of histories to its two views, in loops over interactions and tokens: what
// syncrec/batch/build.py and trainer/data/loading/histories.py do by NumPy, to the bit.
//
// NumPy passes over memory once for each operation, some forty times a view. Here a view is one pass over its tokens and one over
// its targets. One thread: a loader has a process for each core.
//
// Sizes: B users, N interactions, D domains, M tokens of a view, S sequences of a view, L targets of a view, P padded slots.
// syncrec/batch/views.py says what each array holds, and the head of syncrec/batch/build.py draws an example.

#include <ATen/ATen.h>
#include <torch/library.h>

#include <algorithm>
#include <bit>
#include <limits>
#include <numeric>
#include <tuple>
#include <utility>
#include <vector>

namespace {

using at::Tensor;
using Numbers = std::vector<int32_t>;

constexpr int32_t kNone = -1;
constexpr int32_t kNoGap = 17;       // NO_GAP of syncrec/layers/time_encoding.py
constexpr int32_t kLeastSpread = 8;  // as in syncrec/batch/attention_layout.py
constexpr int kDigit = 11;           // bits by which rows are sorted at a time

Tensor numbers(int64_t count) { return at::empty({count}, at::kInt); }

template <typename Value>
Value* data(Tensor& tensor) {
  return tensor.data_ptr<Value>();
}

Tensor copied(const std::vector<int64_t>& values) { return at::tensor(values, at::kLong); }

// ---- histories

// The interactions of all users, and their order by (domain, user, time).
struct Histories {
  int32_t users, count, domains;
  const int64_t* lengths;    // (B)
  const int32_t* domain;     // (N)
  const int32_t* ticks;      // (N)
  const float* weight;       // (B)
  Numbers user;              // (N)
  Numbers by_domain;         // (N)
  Numbers domain_starts;     // (D + 1), in `by_domain`

  Histories(const Tensor& lengths, const Tensor& domain, const Tensor& ticks, const Tensor& weight, int64_t domains)
      : users(lengths.numel()), count(domain.numel()), domains(domains), lengths(lengths.const_data_ptr<int64_t>()),
        domain(domain.const_data_ptr<int32_t>()), ticks(ticks.const_data_ptr<int32_t>()), weight(weight.const_data_ptr<float>()) {
    TORCH_CHECK(domain.numel() < std::numeric_limits<int32_t>::max() / 2, "too many interactions for one batch");
    TORCH_CHECK(lengths.sum().item<int64_t>() == count && ticks.numel() == count, "one of each interaction");
    for (const auto& tensor : {lengths, domain, ticks, weight}) TORCH_CHECK(tensor.is_contiguous(), "one after the other");
    for (int32_t one = 0; one < users; one++) user.insert(user.end(), this->lengths[one], one);
    sort_by_domain();
  }

  void sort_by_domain() {
    domain_starts.assign(domains + 1, 0);
    for (int32_t i = 0; i < count; i++) {
      TORCH_CHECK(0 <= domain[i] && domain[i] < domains, "no domain ", domain[i]);
      domain_starts[domain[i] + 1]++;
    }
    std::partial_sum(domain_starts.begin(), domain_starts.end(), domain_starts.begin());
    Numbers next(domain_starts.begin(), domain_starts.end() - 1);
    by_domain.resize(count);
    for (int32_t i = 0; i < count; i++) by_domain[next[domain[i]]++] = i;
  }
};

// Interactions order[first], …, order[first + count − 1] are a sequence. holds_newest: the last is its user's newest, no input.
struct Group {
  int32_t first, count;
  bool holds_newest;

  int32_t tokens() const { return count + 1 - holds_newest; }  // SOS too
};

struct Grouping {
  Numbers order;
  std::vector<Group> groups;
  std::vector<int64_t> task_ends;  // groups of each task and of those before it
};

// Each user's whole history, which may be empty.
Grouping group_by_user(const Histories& all) {
  Grouping grouping;
  grouping.order.resize(all.count);
  std::iota(grouping.order.begin(), grouping.order.end(), 0);
  int32_t first = 0;
  for (int32_t user = 0; user < all.users; user++) {
    const auto count = int32_t(all.lengths[user]);
    grouping.groups.push_back({first, count, true});
    first += count;
  }
  grouping.task_ends = {all.users};
  return grouping;
}

// Each user's history in each domain, where there is any: by domain, then user.
Grouping group_by_domain(const Histories& all) {
  Grouping grouping;
  grouping.order = all.by_domain;
  const auto& order = grouping.order;
  for (int32_t domain = 0; domain < all.domains; domain++) {
    const int32_t end = all.domain_starts[domain + 1];
    for (int32_t first = all.domain_starts[domain]; first < end;) {
      const int32_t user = all.user[order[first]];
      int32_t next = first;
      while (next < end && all.user[order[next]] == user) next++;
      const int32_t newest = order[next - 1];
      const bool holds_newest = newest + 1 == all.count || all.user[newest + 1] != user;
      grouping.groups.push_back({first, next - first, holds_newest});
      first = next;
    }
    grouping.task_ends.push_back(int64_t(grouping.groups.size()));
  }
  return grouping;
}

// ---- tokens

// ⌊log₂(1 + ticks)⌋, 0 below 0: compute_gaps of syncrec/layers/time_encoding.py.
int32_t gap_of(int32_t ticks) { return ticks < 0 ? 0 : int32_t(std::bit_width(uint32_t(ticks) + 1)) - 1; }

int32_t between(int32_t later, int32_t earlier) { return int32_t(uint32_t(later) - uint32_t(earlier)); }

struct Tokens {
  Tensor input, position, time, gap, sequence;  // (M)
  Tensor starts;                                // (S + 1)
  Numbers lengths;                              // (S)
  Numbers token_of;                             // (N): that predicts the interaction, or kNone
  std::vector<int64_t> task_starts;
  int32_t inputs = 0;                           // tokens that are not SOS
};

Tokens pack(const Histories& all, const Grouping& grouping, int64_t max_length) {
  Tokens packed;
  const auto sequences = int32_t(grouping.groups.size());
  packed.lengths.resize(sequences);
  packed.starts = numbers(sequences + 1);
  auto* starts = data<int32_t>(packed.starts);
  starts[0] = 0;
  for (int32_t s = 0; s < sequences; s++) {
    packed.lengths[s] = int32_t(std::min<int64_t>(grouping.groups[s].tokens(), max_length));
    starts[s + 1] = starts[s] + packed.lengths[s];
  }
  packed.task_starts = {0};
  for (const auto end : grouping.task_ends) packed.task_starts.push_back(starts[end]);
  packed.token_of.assign(all.count, kNone);
  for (auto* tensor : {&packed.input, &packed.position, &packed.time, &packed.gap, &packed.sequence})
    *tensor = numbers(starts[sequences]);
  auto* input = data<int32_t>(packed.input);
  auto* position = data<int32_t>(packed.position);
  auto* time = data<int32_t>(packed.time);
  auto* gap = data<int32_t>(packed.gap);
  auto* sequence = data<int32_t>(packed.sequence);
  int32_t token = 0;
  for (int32_t s = 0; s < sequences; s++) {
    const auto& group = grouping.groups[s];
    const int32_t* own = grouping.order.data() + group.first;
    const int32_t tokens = group.tokens();
    for (int32_t step = tokens - packed.lengths[s]; step < tokens; step++, token++) {
      const int32_t target = step < group.count ? own[step] : kNone;
      const int32_t before = step > 0 ? own[step - 1] : kNone;
      input[token] = 1 + before;
      position[token] = tokens - 1 - step;
      time[token] = target == kNone ? 0 : all.ticks[target];
      gap[token] = before == kNone ? kNoGap : gap_of(between(time[token], all.ticks[before]));
      sequence[token] = s;
      if (target != kNone) packed.token_of[target] = token;
      packed.inputs += before != kNone;
    }
  }
  return packed;
}

// ---- targets

struct Targets {
  Tensor token, interaction, domain, weight, comparable;  // (L)
  std::vector<int64_t> starts;                            // (D + 1)
};

// other_token_of: of the other view.
Targets list_targets(const Histories& all, const Numbers& token_of, const Numbers& other_token_of) {
  Targets targets;
  const auto count = all.count - std::count(token_of.begin(), token_of.end(), kNone);
  for (auto* tensor : {&targets.token, &targets.interaction, &targets.domain}) *tensor = numbers(count);
  targets.weight = at::empty({count}, at::kFloat);
  targets.comparable = at::empty({count}, at::kBool);
  auto* token = data<int32_t>(targets.token);
  auto* interaction = data<int32_t>(targets.interaction);
  auto* target_domain = data<int32_t>(targets.domain);
  auto* weight = data<float>(targets.weight);
  auto* comparable = data<bool>(targets.comparable);
  targets.starts = {0};
  int64_t target = 0;
  for (int32_t domain = 0; domain < all.domains; domain++) {
    for (int32_t place = all.domain_starts[domain]; place < all.domain_starts[domain + 1]; place++) {
      const int32_t i = all.by_domain[place];
      if (token_of[i] == kNone) continue;
      token[target] = token_of[i];
      interaction[target] = i;
      target_domain[target] = domain;
      weight[target] = all.weight[all.user[i]];
      comparable[target] = other_token_of[i] != kNone;
      target++;
    }
    targets.starts.push_back(target);
  }
  return targets;
}

// ---- SC-MIM

// (pool_token, pool_slot). newest_alone: of each slot the last token alone, by slot.
std::tuple<Tensor, Tensor> list_pool(const Histories& all, const Tokens& tokens, bool newest_alone) {
  const auto* input = tokens.input.const_data_ptr<int32_t>();
  Numbers newest(newest_alone ? int64_t(all.users) * all.domains : 0, kNone);
  auto pool_token = numbers(tokens.inputs);
  auto pool_slot = numbers(tokens.inputs);
  auto* token = data<int32_t>(pool_token);
  auto* slot = data<int32_t>(pool_slot);
  int64_t pooled = 0;
  const auto add = [&](int32_t one, int32_t of) {
    token[pooled] = one;
    slot[pooled] = of;
    pooled++;
  };
  for (int64_t one = 0; one < tokens.input.numel(); one++) {
    if (input[one] == 0) continue;
    const int32_t i = input[one] - 1;
    const int32_t of = all.user[i] * all.domains + all.domain[i];
    if (newest_alone)
      newest[of] = int32_t(one);
    else
      add(int32_t(one), of);
  }
  for (size_t of = 0; of < newest.size(); of++)
    if (newest[of] != kNone) add(newest[of], int32_t(of));
  return {pool_token.narrow(0, 0, pooled), pool_slot.narrow(0, 0, pooled)};
}

// ---- attention

// The sequences that have any token, the longest first, of equal length in their order.
Numbers sort_falling(const Numbers& lengths) {
  const int32_t longest = lengths.empty() ? 0 : *std::max_element(lengths.begin(), lengths.end());
  Numbers next(longest + 2, 0);  // where the next sequence of each length goes
  for (const auto length : lengths) next[length]++;
  int32_t place = 0;
  for (int32_t length = longest; length > 0; length--) place += std::exchange(next[length], place);
  Numbers order(place);
  for (size_t s = 0; s < lengths.size(); s++)
    if (lengths[s]) order[next[lengths[s]]++] = int32_t(s);
  return order;
}

struct Layout {
  std::vector<int64_t> shapes;  // sequences and padded length of each bucket
  Tensor pad, unpad;            // (P), (M)
};

Layout lay_out(const Tokens& tokens) {
  Layout layout;
  const auto order = sort_falling(tokens.lengths);
  int64_t slots = 0;
  for (size_t begin = 0; begin < order.size();) {
    const int32_t longest = tokens.lengths[order[begin]];
    const int32_t shortest = longest - std::max(kLeastSpread, longest / 4);
    size_t end = begin;
    while (end < order.size() && tokens.lengths[order[end]] > shortest) end++;
    layout.shapes.insert(layout.shapes.end(), {int64_t(end - begin), longest});
    slots += int64_t(end - begin) * longest;
    begin = end;
  }
  layout.pad = numbers(slots);
  layout.unpad = numbers(tokens.input.numel());
  auto* pad = data<int32_t>(layout.pad);
  auto* unpad = data<int32_t>(layout.unpad);
  const auto* starts = tokens.starts.const_data_ptr<int32_t>();
  auto next = order.begin();
  int32_t slot = 0;
  for (size_t bucket = 0; bucket < layout.shapes.size(); bucket += 2) {
    const auto longest = int32_t(layout.shapes[bucket + 1]);
    for (int64_t row = 0; row < layout.shapes[bucket]; row++, next++, slot += longest) {
      const int32_t length = tokens.lengths[*next];
      const int32_t start = starts[*next];
      std::iota(pad + slot, pad + slot + length, start);
      std::fill(pad + slot + length, pad + slot + longest, start + length - 1);
      std::iota(unpad + start, unpad + start + length, slot);
    }
  }
  return layout;
}

// ---- operators

void add_view(const Histories& all, const Tokens& tokens, const Numbers& other_token_of, bool newest_alone,
              std::vector<Tensor>& arrays) {
  const auto targets = list_targets(all, tokens.token_of, other_token_of);
  const auto [pool_token, pool_slot] = list_pool(all, tokens, newest_alone);
  const auto layout = lay_out(tokens);
  arrays.insert(arrays.end(), {tokens.input, tokens.position, tokens.time, tokens.gap, tokens.sequence, targets.token,
                               targets.interaction, targets.domain, targets.weight, targets.comparable, pool_token, pool_slot,
                               tokens.starts, layout.pad, layout.unpad, copied(layout.shapes), copied(tokens.task_starts),
                               copied(targets.starts)});
}

// The arrays of the cross-domain view, then those of the single-domain view, as `add_view` lists them.
std::vector<Tensor> build(const Tensor& lengths, const Tensor& domain, const Tensor& ticks, const Tensor& weight, int64_t domains,
                          int64_t max_length, bool newest_alone) {
  const Histories all(lengths, domain, ticks, weight, domains);
  const auto cross = pack(all, group_by_user(all), max_length);
  const auto single = pack(all, group_by_domain(all), max_length);
  std::vector<Tensor> arrays;
  add_view(all, cross, single.token_of, newest_alone, arrays);
  add_view(all, single, cross.token_of, newest_alone, arrays);
  return arrays;
}

// Histories of users out of blocks: (lengths (B), items (N), ticks (N)). bounds, items, ticks: of each block; user k of a block has
// the interactions bounds[k] to bounds[k + 1]. block, place: of each user (B).
std::tuple<Tensor, Tensor, Tensor> gather(at::TensorList bounds, at::TensorList items, at::TensorList ticks, const Tensor& block,
                                          const Tensor& place) {
  TORCH_CHECK(bounds.size() == items.size() && items.size() == ticks.size(), "one of each for a block");
  TORCH_CHECK(block.is_contiguous() && place.is_contiguous() && block.numel() == place.numel(), "one for each user");
  std::vector<const int64_t*> begins;
  for (size_t one = 0; one < bounds.size(); one++) {
    TORCH_CHECK(bounds[one].is_contiguous() && items[one].is_contiguous() && ticks[one].is_contiguous(), "one after the other");
    begins.push_back(bounds[one].const_data_ptr<int64_t>());
    const int64_t end = begins.back()[bounds[one].numel() - 1];
    TORCH_CHECK(items[one].numel() == end && ticks[one].numel() == end, "one for each interaction");
  }
  const auto users = block.numel();
  const auto* from = block.const_data_ptr<int64_t>();
  const auto* at = place.const_data_ptr<int64_t>();
  auto lengths = at::empty({users}, at::kLong);
  auto* length = data<int64_t>(lengths);
  int64_t total = 0;
  for (int64_t user = 0; user < users; user++) {
    TORCH_CHECK(0 <= from[user] && from[user] < int64_t(bounds.size()), "no block ", from[user]);
    TORCH_CHECK(0 <= at[user] && at[user] + 1 < bounds[from[user]].numel(), "no user ", at[user]);
    length[user] = begins[from[user]][at[user] + 1] - begins[from[user]][at[user]];
    total += length[user];
  }
  auto all_items = numbers(total);
  auto all_ticks = at::empty({total}, at::kUInt16);
  auto* item = data<int32_t>(all_items);
  auto* tick = data<uint16_t>(all_ticks);
  for (int64_t user = 0; user < users; user++) {
    const int64_t begin = begins[from[user]][at[user]];
    item = std::copy_n(items[from[user]].const_data_ptr<int32_t>() + begin, length[user], item);
    tick = std::copy_n(ticks[from[user]].const_data_ptr<uint16_t>() + begin, length[user], tick);
  }
  return {lengths, all_items, all_ticks};
}

// The interactions that are among the newest `most` of their user and domain, and how many each user has of them.
std::tuple<Tensor, Tensor> trim(const Tensor& lengths, const Tensor& domain, int64_t domains, int64_t most) {
  TORCH_CHECK(lengths.is_contiguous() && domain.is_contiguous(), "one after the other");
  const auto* length = lengths.const_data_ptr<int64_t>();
  const auto* of = domain.const_data_ptr<int32_t>();
  auto kept = at::empty({domain.numel()}, at::kLong);
  auto kept_lengths = at::empty_like(lengths);
  auto* place = data<int64_t>(kept);
  std::vector<int64_t> left(domains, 0);  // of the user, from here on; all 0 between users
  int64_t total = 0;
  int64_t begin = 0;
  for (int64_t user = 0; user < lengths.numel(); user++) {
    const int64_t end = begin + length[user];
    const int64_t before = total;
    for (int64_t i = begin; i < end; i++) left[of[i]]++;
    for (int64_t i = begin; i < end; i++)
      if (left[of[i]]-- <= most) place[total++] = i;
    data<int64_t>(kept_lengths)[user] = total - before;
    begin = end;
  }
  return {kept.narrow(0, 0, total), kept_lengths};
}

// Each row once, rising, int64, and which of these each use is, int32. Sorted by digits (radix sort).
std::tuple<Tensor, Tensor> list_rows(const Tensor& rows) {
  TORCH_CHECK(rows.is_contiguous(), "rows lie one after the other");
  const auto* row = rows.const_data_ptr<int64_t>();
  const int64_t count = rows.numel();
  std::vector<uint64_t> keys(count), sorted(count);  // the row, and its place in the lower half
  int64_t all_bits = 0;
  for (int64_t i = 0; i < count; i++) {
    all_bits |= row[i];
    keys[i] = uint64_t(row[i]) << 32 | uint64_t(i);
  }
  TORCH_CHECK(0 <= all_bits && all_bits <= std::numeric_limits<int32_t>::max(), "rows are less than 2^31");
  for (int shift = 32; (all_bits << 32) >> shift; shift += kDigit) {
    const auto digit = [&](uint64_t key) { return key >> shift & ((1 << kDigit) - 1); };
    std::vector<int64_t> next((1 << kDigit) + 1, 0);
    for (const auto key : keys) next[digit(key) + 1]++;
    std::partial_sum(next.begin(), next.end(), next.begin());
    for (const auto key : keys) sorted[next[digit(key)]++] = key;
    keys.swap(sorted);
  }
  auto distinct = at::empty({count}, at::kLong);
  auto inverse = numbers(count);
  auto* once = data<int64_t>(distinct);
  auto* which = data<int32_t>(inverse);
  int64_t last = kNone;
  for (const auto key : keys) {
    const auto one = int64_t(key >> 32);
    if (last == kNone || once[last] != one) once[++last] = one;
    which[key & 0xffffffff] = int32_t(last);
  }
  return {distinct.narrow(0, 0, last + 1), inverse};
}

}  // namespace

TORCH_LIBRARY(batch, library) {
  library.def(
      "build(Tensor lengths, Tensor domain, Tensor ticks, Tensor weight, int domains, int max_length, bool newest_alone) "
      "-> Tensor[]",
      &build);
  library.def(
      "gather(Tensor[] bounds, Tensor[] items, Tensor[] ticks, Tensor block, Tensor place) -> (Tensor, Tensor, Tensor)", &gather);
  library.def("trim(Tensor lengths, Tensor domain, int domains, int most) -> (Tensor, Tensor)", &trim);
  library.def("list_rows(Tensor rows) -> (Tensor, Tensor)", &list_rows);
}
