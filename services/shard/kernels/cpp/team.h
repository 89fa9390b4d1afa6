// Threads that run the same code and share out the loops in it, of which nobody is waited for.
//
// Where OpenMP ends a loop with a barrier, a thread whose core does something else for a moment, as
// the other processes of a mesh do, holds up all others. Here a loop is over when its shares are
// done, whoever did them: a thread with nothing left to do computes what another has begun and not
// finished, and whichever of them is first writes it down. A late thread finds that out when it
// wants to write, and catches up by passing the loops that are over. (`each`, for what is small or
// changes what it reads, waits.)
//
// What a late thread reads may be overwritten meanwhile, and what it makes of that is thrown away.
// So memory that shares read must be there until `in_team` ends, where all are waited for; and how
// the threads go on must not depend on what a loop computed.
#pragma once

#include <immintrin.h>
#include <omp.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <vector>

#include "common.h"

namespace infermesh {

// Values; fewer are done before another thread has woken up.
constexpr int64_t kWorthThreads = 1 << 15;
// Work is handed out in so many shares, that a thread which is late makes little of it late.
constexpr int64_t kSharesPerThread = 16;
// More shares than this are more than one loop.
constexpr int64_t kMostSharesPerThread = 128;

// Numbers that threads exchange begin with the loop that they are of.
constexpr int kLoopBits = 32;
constexpr uint64_t kFirstLoop = 1;

// Where a thread can be late with a part of a share; tests make it so, see team.cpp.
enum class Moment { kBefore, kComputed, kWriting };
#if defined(INFERMESH_LATE)
void be_late(int64_t member, Moment moment);
#else
inline void be_late(int64_t, Moment) {}
#endif

struct Team {
  explicit Team(int64_t num_threads)
      : shares(new std::atomic<uint64_t>[num_threads * kMostSharesPerThread]()) {}

  // Parts of shares that were written by another thread than had taken them, in all teams so far.
  static std::atomic<int64_t>& num_helped() {
    static std::atomic<int64_t> count{0};
    return count;
  }

  // The latest loop that had a share, the parts of it that are there, and whether one is written.
  std::unique_ptr<std::atomic<uint64_t>[]> shares;
  // For what one loop computes and the next one reads, and what it was before it grew.
  std::atomic<float*> room{nullptr};
  std::vector<std::vector<float>> rooms;
  alignas(64) std::atomic<uint64_t> cursor{kFirstLoop << kLoopBits};  // the loop, its next share
  alignas(64) std::atomic<int64_t> num_done{0};                       // shares of that loop
};

// One thread of a team.
class Member {
 public:
  Member(Team& team, int64_t number, int64_t team_size)
      : team(team), team_size(team_size), number_(number) {}

  // The one of this thread, or null.
  static Member*& current() {
    static thread_local Member* member = nullptr;
    return member;
  }

  template <typename Work>
  void each(int64_t count, const Work& work) {
    if (count == 0) return;
    const uint64_t loop = loop_++;
    for (int64_t i; (i = take(loop, count)) >= 0;) {
      work(i);
      count_done(loop, count);
    }
    for (int64_t pauses = 0; is_in(loop); ++pauses) pause(pauses);
  }

  template <typename Work>
  void each_share(int64_t count, Work& work) {
    const int64_t most = team_size * kMostSharesPerThread;
    for (int64_t first = 0; first < count; first += most)
      share_out(first, std::min(most, count - first), work);
  }

  Team& team;
  const int64_t team_size;

 private:
  static constexpr uint64_t kWriting = 1, kPart = 2;
  static constexpr uint64_t kPatience = 40'000;  // cycles, of a thread that had no share
  static constexpr int64_t kPauses = 1000;       // then whoever wants this core gets it

  bool is_in(uint64_t loop) const { return team.cursor.load() >> kLoopBits == loop; }

  static void pause(int64_t pauses) {
    if (pauses < kPauses)
      _mm_pause();
    else
      sched_yield();
  }

  // Shares [first, first + count).
  template <typename Work>
  void share_out(int64_t first, int64_t count, Work& work) {
    const uint64_t loop = loop_++;
    uint64_t shortest = kPatience, start = __rdtsc();
    for (int64_t i, taken = 0; (i = take(loop, count)) >= 0; ++taken) {
      run(loop, first, count, i, work);
      const uint64_t end = __rdtsc();
      shortest = taken == 0 ? end - start : std::min(shortest, end - start);
      start = end;
    }
    for (int64_t pauses = 0; is_in(loop); ++pauses) {
      pause(pauses);
      if (__rdtsc() - start < shortest + shortest / 2) continue;
      help(loop, first, count, work);
      start = __rdtsc();
    }
  }

  // The next share of a loop, or -1.
  int64_t take(uint64_t loop, int64_t count) {
    uint64_t at = team.cursor.load();
    do {
      if (at >> kLoopBits != loop || static_cast<uint32_t>(at) == count) return -1;
    } while (!team.cursor.compare_exchange_weak(at, at + 1));
    return static_cast<uint32_t>(at);
  }

  void count_done(uint64_t loop, int64_t count) {
    if (team.num_done.fetch_add(1) + 1 < count) return;
    team.num_done.store(0);
    team.cursor.store((loop + 1) << kLoopBits);
  }

  // What is not there of a share, unless another thread writes it just now. Returns how many parts.
  template <typename Work>
  int64_t run(uint64_t loop, int64_t first, int64_t count, int64_t i, Work& work) {
    const int64_t share = first + i;
    std::atomic<uint64_t>& state = team.shares[i];
    const uint64_t begun = loop << kLoopBits, end = begun + work.num_parts(share) * kPart;
    int64_t written = 0;
    uint64_t at = state.load();
    while (at < end && (at < begun || !(at & kWriting))) {
      const uint64_t part = at < begun ? 0 : (at - begun) / kPart;
      be_late(number_, Moment::kBefore);
      work.compute(share, part);
      be_late(number_, Moment::kComputed);
      if (!state.compare_exchange_strong(at, begun + part * kPart + kWriting)) continue;
      be_late(number_, Moment::kWriting);
      work.write(share, part);
      at = begun + (part + 1) * kPart;
      state.store(at);
      ++written;
      if (at == end) count_done(loop, count);
    }
    return written;
  }

  // What others have not finished; each thread looks elsewhere first.
  template <typename Work>
  void help(uint64_t loop, int64_t first, int64_t count, Work& work) {
    for (int64_t i = 0; i < count && is_in(loop); ++i) {
      const int64_t place = (number_ * count / team_size + i) % count;
      const int64_t written = run(loop, first, count, place, work);
      if (written) Team::num_helped().fetch_add(written, std::memory_order_relaxed);
    }
  }

  const int64_t number_;
  uint64_t loop_ = kFirstLoop;
};

// Runs `body` on threads that share its loops; in a team, on each thread of that.
template <typename Body>
void in_team(int64_t num_threads, const Body& body) {
  if (num_threads <= 1 || Member::current() != nullptr) return body();
  Team team(num_threads);
#pragma omp parallel num_threads(static_cast<int>(num_threads))
  {
    Member member(team, omp_get_thread_num(), omp_get_num_threads());
    Member::current() = &member;
    body();
    Member::current() = nullptr;
  }
}

inline int64_t team_size() {
  const Member* member = Member::current();
  return member == nullptr ? 1 : member->team_size;
}

// work(i) for i below count, by whichever thread has time; a late one is waited for.
template <typename Work>
void each(int64_t count, const Work& work) {
  if (Member* member = Member::current()) return member->each(count, work);
  for (int64_t i = 0; i < count; ++i) work(i);
}

// Work of one thread, on which the others wait.
template <typename Work>
void once(const Work& work) {
  each(1, [&](int64_t) { work(); });
}

// work(first, last) for parts of rows, of so many values in all.
template <typename Work>
void each_part(int64_t rows, int64_t values, const Work& work) {
  const int64_t threads = values > kWorthThreads ? omp_get_max_threads() : 1;
  in_team(threads, [&] {
    const int64_t most = values > kWorthThreads ? team_size() * 4 : 1;
    const int64_t parts = std::min(most, rows);
    each(parts, [&](int64_t i) { work(rows * i / parts, rows * (i + 1) / parts); });
  });
}

// Memory of the team for what one loop computes and the next one reads, good until the next call.
inline float* room(int64_t size) {
  Team& team = Member::current()->team;
  once([&] {
    if (team.rooms.empty() || static_cast<int64_t>(team.rooms.back().size()) < size)
      team.rooms.emplace_back(size);
    team.room = team.rooms.back().data();
  });
  return team.room;
}

// Shares of work, which may have several parts: `work.compute(share, part)` in memory of the
// thread's own, and then `work.write(share, part)` to where others read it. More than one thread may
// compute a part, one of them writes it, and that after the parts before it.
template <typename Work>
void each_share(int64_t count, Work& work) {
  if (Member* member = Member::current()) return member->each_share(count, work);
  for (int64_t share = 0; share < count; ++share)
    for (int64_t part = 0; part < work.num_parts(share); ++part) {
      work.compute(share, part);
      work.write(share, part);
    }
}

// As above, where each share is one part.
template <typename Compute, typename Write>
void each_share(int64_t count, const Compute& compute, const Write& write) {
  struct {
    const Compute& computes;
    const Write& writes;
    static int64_t num_parts(int64_t) { return 1; }
    void compute(int64_t share, int64_t) const { computes(share); }
    void write(int64_t share, int64_t) const { writes(share); }
  } const work{compute, write};
  each_share(count, work);
}

}  // namespace infermesh
