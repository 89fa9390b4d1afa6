// One token per row of logits. The same arithmetic as exact_weights.py, truncation.py,
// inverse_cdf.py, logit_edits.py and torch_sampler.py have in torch, so the same tokens, bit for
// bit: weights are integers whose float64 sums are exact in any order. Rows share nothing; each is
// computed by one thread. Most of the work is skipped by block: one whose largest logit is cut off
// has no weight.
#include <algorithm>
#include <cmath>
#include <functional>
#include <new>
#include <utility>
#include <vector>

#include "exact_weights.h"
#include "logit_blocks.h"
#include "team.h"

namespace infermesh {
namespace {

constexpr int kMostTop = 20;      // as MOST_TOP in row_plan.py
constexpr int kCandidates = 256;  // nearly always what top_p keeps is among so many
constexpr int kFineness = 32;     // bins per unit of the exponent
constexpr int kNumBins = (kScaleBits + 1) * kFineness;
constexpr float kLog2E = 1.44269504088896340736f;

// As ROW in row_plan.py, which says what each is.
struct Row {
  double noise, top_p;
  int64_t bias_end, history_end, suppressed_end;
  float scale, least, repetition, frequency, presence;
  int32_t top_k, described, unused;
};
static_assert(sizeof(Row) == 72, "row_plan.ROW has another layout");

struct Edits {
  const int64_t* bias_ids;
  const float* bias;
  const int64_t* history_ids;
  const float* output_counts;
  const int64_t* suppressed_ids;
};

// The `count`-th largest of the blocks' largest: as many tokens at least are not below it.
float floor_of(const std::vector<float>& maxima, int64_t count, std::vector<float>& scratch) {
  if (count > static_cast<int64_t>(maxima.size())) return kMinusInfinity;
  scratch = maxima;
  std::nth_element(scratch.begin(), scratch.begin() + (count - 1), scratch.end(),
                   std::greater<float>());
  return scratch[count - 1];
}

template <typename T>
class Sampler {
 public:
  Sampler(const T* logits, int64_t vocab)
      : logits_(logits), vocab_(vocab), blocks_(logits, vocab), maxima_(blocks_.count()) {}

  // Finds the largest of each block; whether all logits are numbers.
  bool scan() {
    Floats zeros{};  // NaN where a logit is no number
    for (int64_t b = 0; b < vocab_ / kBlock; ++b) {
      const float* block = blocks_(b, buffer_);
      maxima_[b] = largest_of(block);
      for (int i = 0; i < kBlock; i += kWidth) zeros += load_floats(block + i) * 0.0f;
    }
    float rest = sum(zeros);
    for (int64_t i = vocab_ - vocab_ % kBlock; i < vocab_; ++i) rest += to_float(logits_[i]) * 0.0f;
    if (vocab_ % kBlock) maxima_.back() = largest_of(blocks_(blocks_.count() - 1, buffer_));
    largest_ = *std::max_element(maxima_.begin(), maxima_.end());
    return rest == 0.0f;
  }

  // Writes what Sampled.described holds from its second column on.
  void describe(double* out) {
    const Exponent exponent{largest_, kLog2E};
    out[0] = largest_;
    out[1] = sum_blocks(exponent, kNothing);
    std::vector<std::pair<float, int64_t>> top;
    const int64_t count = std::min<int64_t>(kMostTop, vocab_);
    const float floor = floor_of(maxima_, count, scratch_);
    for (int64_t b = 0; b < blocks_.count(); ++b) {
      if (maxima_[b] < floor) continue;
      const float* block = blocks_(b, buffer_);
      const int64_t end = std::min<int64_t>(kBlock, vocab_ - b * kBlock);
      for (int64_t i = 0; i < end; ++i)
        if (block[i] >= floor) top.emplace_back(-block[i], b * kBlock + i);
    }
    std::partial_sort(top.begin(), top.begin() + count, top.end());
    for (int64_t i = 0; i < count; ++i) {
      out[2 + i] = static_cast<double>(top[i].second);
      out[2 + count + i] = -top[i].first;
    }
  }

  // Bias, penalties and suppressed tokens; see logit_edits.py.
  void edit(const Row& previous, const Row& row, const Edits& edits) {
    std::vector<bool> changed(blocks_.count(), false);
    const auto each = [&](const int64_t* ids, int64_t from, int64_t to, auto change) {
      for (int64_t i = from; i < to; ++i) {
        float& logit = blocks_.own(ids[i] / kBlock)[ids[i] % kBlock];
        logit = change(logit, i);
        changed[ids[i] / kBlock] = true;
      }
    };
    each(edits.bias_ids, previous.bias_end, row.bias_end,
         [&](float logit, int64_t i) { return logit + edits.bias[i]; });
    each(edits.history_ids, previous.history_end, row.history_end, [&](float logit, int64_t i) {
      const float count = edits.output_counts[i];
      logit = logit > 0 ? logit / row.repetition : logit * row.repetition;
      logit = rounded(logit) - rounded(row.frequency * count);
      return logit - (count > 0 ? row.presence : 0.0f);
    });
    each(edits.suppressed_ids, previous.suppressed_end, row.suppressed_end,
         [](float, int64_t) { return kMinusInfinity; });
    for (int64_t b = 0; b < blocks_.count(); ++b)
      if (changed[b]) maxima_[b] = largest_of(blocks_(b, buffer_));
    largest_ = *std::max_element(maxima_.begin(), maxima_.end());
  }

  // The first of the largest.
  int64_t greedy() {
    const int64_t b = std::find(maxima_.begin(), maxima_.end(), largest_) - maxima_.begin();
    const float* block = blocks_(b, buffer_);
    return b * kBlock + (std::find(block, block + kBlock, largest_) - block);
  }

  int64_t draw(const Row& row) {
    // All suppressed, or a penalty beyond all bounds.
    if (!std::isfinite(largest_)) return greedy();
    const Exponent exponent{largest_, row.scale};
    const float cutoff = std::max(kNothing, find_cutoff(exponent, row));
    const double wanted = row.noise * sum_blocks(exponent, cutoff);
    double before = 0;
    for (int64_t b = 0; b < blocks_.count(); ++b) {
      if (before + sums_[b] > wanted)
        return b * kBlock + place_in(b, exponent, cutoff, wanted - before);
      before += sums_[b];
    }
    return greedy();  // not reached: the noise is below 1
  }

 private:
  // The weight of what is not cut off, per block and in all.
  double sum_blocks(const Exponent& exponent, float cutoff) {
    sums_.assign(blocks_.count(), 0.0);
    double total = 0;
    for (int64_t b = 0; b < blocks_.count(); ++b) {
      if (!(exponent(maxima_[b]) >= cutoff)) continue;
      const float* block = blocks_(b, buffer_);
      sums_[b] = weight_of_block(
          [&](int i) { return cut(exponent(load_floats(block + i)), cutoff); });
      total += sums_[b];
    }
    return total;
  }

  int64_t place_in(int64_t b, const Exponent& exponent, float cutoff, double wanted) {
    const float* block = blocks_(b, buffer_);
    float weights[kBlock];
    for (int i = 0; i < kBlock; i += kWidth)
      store(weights + i, weights_of(cut(exponent(load_floats(block + i)), cutoff)).whole());
    double sum = 0;
    for (int i = 0; i < kBlock; ++i)
      if ((sum += weights[i]) > wanted) return i;
    return kBlock - 1;
  }

  // See truncation.py.
  float find_cutoff(const Exponent& exponent, const Row& row) {
    float cutoff = kMinusInfinity;
    if (row.top_k > 0) {
      gather(exponent, row.top_k);
      std::nth_element(found_.begin(), found_.begin() + (row.top_k - 1), found_.end(),
                       std::greater<float>());
      cutoff = found_[row.top_k - 1];
    }
    if (row.top_p < 1.0) cutoff = std::max(cutoff, find_nucleus(exponent, row, cutoff));
    return std::max(cutoff, row.least);
  }

  // Exponents into `found_`: the `count` largest at least.
  void gather(const Exponent& exponent, int64_t count) {
    gather_between(exponent, exponent(floor_of(maxima_, count, scratch_)), 0.0f);
  }

  // Those from `low` to `high`, both included.
  void gather_between(const Exponent& exponent, float low, float high) {
    found_.clear();
    size_t count = 0;
    for (int64_t b = 0; b < blocks_.count(); ++b) {
      if (!(exponent(maxima_[b]) >= low)) continue;
      const float* block = blocks_(b, buffer_);
      float y[kBlock];
      Ints any{};
      for (int i = 0; i < kBlock; i += kWidth) {
        const Floats of_tokens = exponent(load_floats(block + i));
        any |= (of_tokens >= low) & (of_tokens <= high);
        store(y + i, of_tokens);
      }
      if (!holds(any)) continue;
      found_.resize(count + kBlock);
      // Without branches, which nothing could predict.
      for (float value : y) {
        found_[count] = value;
        count += value >= low && value <= high;
      }
    }
    found_.resize(count);
  }

  static bool holds(Ints mask) {
    int64_t parts[kWidth / 2], any = 0;
    std::memcpy(parts, &mask, sizeof mask);
    for (int64_t part : parts) any |= part;
    return any != 0;
  }

  float find_nucleus(const Exponent& exponent, const Row& row, float kth) {
    const double wanted = row.top_p * sum_blocks(exponent, std::max(kNothing, kth));
    gather(exponent, kCandidates);
    float nucleus = kNothing;
    if (!reach(wanted, &nucleus)) search_bins(exponent, wanted, &nucleus);
    return nucleus;
  }

  // From the weight of each range of exponents, and the order within one.
  void search_bins(const Exponent& exponent, double wanted, float* nucleus) {
    // Two, as adding to one place twice in a row is slow.
    std::vector<double> mass(2 * kNumBins, 0.0);
    double* const pair[2] = {mass.data(), mass.data() + kNumBins};
    for (int64_t b = 0; b < blocks_.count(); ++b) {
      if (sums_[b] == 0) continue;
      const float* block = blocks_(b, buffer_);
      float weights[kBlock];
      int32_t bins[kBlock];
      for (int i = 0; i < kBlock; i += kWidth) {
        const Floats y = cut(exponent(load_floats(block + i)), kNothing);
        store(weights + i, weights_of(y).whole());
        store(bins + i, bins_of(y));
      }
      for (int i = 0; i < kBlock; ++i) pair[i % 2][bins[i]] += weights[i];
    }
    double above = 0, here = 0;
    int bin = -1;
    do {
      above += here;
      ++bin;
      here = pair[0][bin] + pair[1][bin];
    } while (bin < kNumBins - 1 && above + here < wanted);
    // With the edge of the next bin, which comes after all of this one.
    const float high = -static_cast<float>(bin) / kFineness;
    gather_between(exponent, high - 1.0f / kFineness, high);
    reach(wanted - above, nucleus);
  }

  static Ints bins_of(Floats exponents) {
    const Ints bins = __builtin_convertvector(exponents * static_cast<float>(-kFineness), Ints);
    return bins < kNumBins ? bins : Ints{} + (kNumBins - 1);
  }

  // The largest exponent in `found_` at which its weight and that of all above reaches `wanted`.
  bool reach(double wanted, float* at) {
    size_t begin = 0, end = found_.size();
    double before = 0;
    bool reached = false;
    while (begin < end) {
      const size_t middle = begin + (end - begin) / 2;
      std::nth_element(found_.begin() + begin, found_.begin() + middle, found_.begin() + end,
                       std::greater<float>());
      const double upto = before + weight_of(begin, middle + 1);
      if (upto >= wanted) {
        *at = found_[middle];
        reached = true;
        end = middle;
      } else {
        before = upto;
        begin = middle + 1;
      }
    }
    return reached;
  }

  double weight_of(size_t begin, size_t end) const {
    double total = 0;
    for (; begin < end; begin += kBlock) {
      float block[kBlock];
      const size_t count = std::min<size_t>(kBlock, end - begin);
      std::copy_n(found_.data() + begin, count, block);
      std::fill(block + count, block + kBlock, kMinusInfinity);
      total += weight_of_block([&](int i) { return cut(load_floats(block + i), kNothing); });
    }
    return total;
  }

  const T* logits_;
  int64_t vocab_;
  Blocks<T> blocks_;
  std::vector<float> maxima_;
  std::vector<double> sums_;
  std::vector<float> found_, scratch_;
  float largest_ = 0;
  float buffer_[kBlock];
};

template <typename T>
void sample_row(const T* logits, int64_t vocab, const Row& previous, const Row& row,
                const Edits& edits, double* out) {
  Sampler<T> sampler(logits, vocab);
  out[1] = sampler.scan();
  if (out[1] == 0) return;
  if (row.described) sampler.describe(out + 3);
  if (previous.bias_end < row.bias_end || previous.history_end < row.history_end ||
      previous.suppressed_end < row.suppressed_end)
    sampler.edit(previous, row, edits);
  const int64_t token = row.scale == 0 ? sampler.greedy() : sampler.draw(row);
  out[0] = static_cast<double>(token);
  out[2] = to_float(logits[token]);
}

template <typename T>
void sample_rows(const T* logits, int64_t num_rows, int64_t vocab, const Row* rows,
                 const Edits& edits, double* out, int64_t out_width) {
  const auto sample = [&](int64_t i) {
    const Row none{};
    try {
      sample_row(logits + i * vocab, vocab, i ? rows[i - 1] : none, rows[i], edits,
                 out + i * out_width);
    } catch (const std::bad_alloc&) {
      out[i * out_width + 1] = -1;
    }
  };
  in_team(std::min<int64_t>(num_rows, omp_get_max_threads()), [&] { each(num_rows, sample); });
}

}  // namespace
}  // namespace infermesh

// Args:
//   logits: [num_rows, vocab], float or the bits of bfloat16.
//   rows: [num_rows] of Row.
//   out: [num_rows, out_width], zeros: token, whether all logits are numbers (-1: no memory for
//     the row), then what Sampled.described holds.
extern "C" void infermesh_sample_rows(const void* logits, int32_t is_bfloat16, int64_t num_rows,
                                      int64_t vocab, const void* rows, const int64_t* bias_ids,
                                      const float* bias, const int64_t* history_ids,
                                      const float* output_counts, const int64_t* suppressed_ids,
                                      double* out, int64_t out_width) {
  using namespace infermesh;
  const Edits edits{bias_ids, bias, history_ids, output_counts, suppressed_ids};
  const Row* plan = static_cast<const Row*>(rows);
  if (is_bfloat16)
    sample_rows(static_cast<const BFloat16*>(logits), num_rows, vocab, plan, edits, out, out_width);
  else
    sample_rows(static_cast<const float*>(logits), num_rows, vocab, plan, edits, out, out_width);
}
