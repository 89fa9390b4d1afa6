// A row of logits as the sampler reads it: in blocks, some of them changed.
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "common.h"
#include "exact_weights.h"

namespace infermesh {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

// The vocabulary in blocks, each as 64 floats. Blocks that are edited, and the last one where it is
// not whole, are kept apart; all others are read where they are.
template <typename T>
class Blocks {
 public:
  Blocks(const T* logits, int64_t vocab)
      : logits_(logits), vocab_(vocab), place_((vocab + kBlock - 1) / kBlock, -1) {
    if (vocab % kBlock) own(count() - 1);
  }

  int64_t count() const { return static_cast<int64_t>(place_.size()); }

  // Valid until the next call with the same buffer, or of `own`.
  const float* operator()(int64_t block, float* buffer) const {
    if (place_[block] >= 0) return apart_.data() + place_[block];
    return widened(logits_ + block * kBlock, buffer);
  }

  // A copy that may be changed; what is not in the vocabulary is -infinity.
  float* own(int64_t block) {
    if (place_[block] < 0) {
      const T* from = logits_ + block * kBlock;
      float values[kBlock];
      std::fill(values, values + kBlock, kMinusInfinity);
      const int64_t end = std::min<int64_t>(kBlock, vocab_ - block * kBlock);
      if (end == kBlock)
        for (int i = 0; i < kBlock; i += kWidth) store(values + i, load_floats(from + i));
      else
        for (int64_t i = 0; i < end; ++i) values[i] = to_float(from[i]);
      place_[block] = static_cast<int32_t>(apart_.size());
      apart_.insert(apart_.end(), values, values + kBlock);
    }
    return apart_.data() + place_[block];
  }

 private:
  static const float* widened(const float* from, float*) { return from; }
  static const float* widened(const BFloat16* from, float* buffer) {
    for (int i = 0; i < kBlock; i += kWidth) store(buffer + i, load_floats(from + i));
    return buffer;
  }

  const T* logits_;
  int64_t vocab_;
  std::vector<int32_t> place_;  // in apart_, or -1
  std::vector<float> apart_;
};

inline float largest_of(const float* block) {
  Floats most = load_floats(block);
  for (int i = kWidth; i < kBlock; i += kWidth) {
    const Floats next = load_floats(block + i);
    most = next > most ? next : most;
  }
  return largest(most);
}

}  // namespace infermesh
