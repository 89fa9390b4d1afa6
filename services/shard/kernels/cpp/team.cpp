#include "team.h"

#if defined(INFERMESH_LATE)
#include <unistd.h>

namespace infermesh {
namespace {

std::atomic<int64_t> late_member{-1}, late_moments{0}, late_microseconds{0}, one_in{1};

}  // namespace

void be_late(int64_t member, Moment moment) {
  static thread_local uint64_t drawn = 1 + static_cast<uint64_t>(member);
  if (late_member >= 0 && late_member != member) return;
  if (!(late_moments >> static_cast<int>(moment) & 1)) return;
  drawn = drawn * 6364136223846793005u + 1442695040888963407u;
  if ((drawn >> 33) % one_in == 0) usleep(static_cast<useconds_t>(late_microseconds));
}

}  // namespace infermesh

// From now on one member of each team, or with -1 any of them, is late at some moments, of which
// bit i is that with number i: one time in so many.
extern "C" void infermesh_make_late(int64_t member, int64_t moments, int64_t microseconds,
                                    int64_t times) {
  using namespace infermesh;
  late_member = member, late_moments = moments, late_microseconds = microseconds, one_in = times;
}
#endif

// Parts of work that threads wrote for others, which were late, in this process so far.
extern "C" void infermesh_num_helped(int64_t* out) {
  *out = infermesh::Team::num_helped().load(std::memory_order_relaxed);
}
