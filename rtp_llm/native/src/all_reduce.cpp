// Collectives between CPU ranks through a shared-memory segment, see rtp_llm/parallel/shared_memory.py for its layout.
#include <sched.h>

#include "lanes.h"
#include "spin.h"
#include "team.h"

// `native_exchange.GroupState`: one rank's view of the segment. The segment: a counter for each rank, then two
// alternating buffers with a slot for each rank.
struct GroupState {
  char* segment;
  int64_t counter_bytes, slot_bytes;
  int64_t sequence;   // the value of this rank's counter
  int64_t operation;  // selects the buffer
  double timeout, wait_seconds;
  int rank, size, is_aborted;
};

namespace {

constexpr double SPIN_SECONDS = 20e-6, YIELD_SECONDS = 2e-3;
constexpr long SLEEP_NANOSECONDS = 50'000;
// Up to this size every rank adds up all slots. Above, each adds up its part, and a second meeting shares the parts, so
// that the bytes a rank reads do not grow with the number of ranks.
constexpr int64_t MAX_DIRECT_BYTES = 32 << 10;
constexpr int64_t MIN_PARALLEL_BYTES = 256 << 10;
constexpr int64_t LINE_BYTES = 128;
constexpr int64_t RUN = 1 << 10;  // vectors that a thread adds up at once

class Group {
 public:
  explicit Group(GroupState* state) : state_(*state) {}

  int rank() const { return state_.rank; }
  int size() const { return state_.size; }
  int64_t slot_bytes() const { return state_.slot_bytes; }

  // Starts an operation. It may write this rank's slot in the next buffer: every rank has come to a meeting of the
  // operation in between, and so has read what the buffer held before.
  void begin() { state_.operation++; }

  char* slot(int rank) const {
    int64_t index = (state_.operation & 1) * state_.size + rank;
    return state_.segment + state_.size * state_.counter_bytes + index * state_.slot_bytes;
  }

  // Waits until all ranks have come to this meeting: what they have written before can be read then. Spins first, since
  // they usually follow within microseconds, then yields the core, which one of them may need, then sleeps.
  // Returns false after the timeout, or once the group is aborted.
  bool meet() {
    state_.sequence++;
    __atomic_store_n(counter(state_.rank), state_.sequence, __ATOMIC_RELEASE);
    if (is_aborted()) return false;
    if (all_are_here()) return true;
    double start = now(), waited = 0;
    for (bool here = spin_until([this] { return all_are_here(); }, SPIN_SECONDS); !here; here = yield(waited)) {
      waited = now() - start;
      if (is_aborted() || waited > state_.timeout) return false;
    }
    state_.wait_seconds += now() - start;
    return true;
  }

 private:
  int64_t* counter(int rank) const {
    return reinterpret_cast<int64_t*>(state_.segment + rank * state_.counter_bytes);
  }

  bool is_aborted() const { return __atomic_load_n(&state_.is_aborted, __ATOMIC_RELAXED) != 0; }

  bool all_are_here() const {
    for (int rank = 0; rank < state_.size; rank++)
      if (__atomic_load_n(counter(rank), __ATOMIC_ACQUIRE) < state_.sequence) return false;
    return true;
  }

  bool yield(double waited) const {
    timespec pause{0, SLEEP_NANOSECONDS};
    if (waited < YIELD_SECONDS) sched_yield();
    else nanosleep(&pause, nullptr);
    return all_are_here();
  }

  GroupState& state_;
};

// Writes the sums of the slots' elements [begin, end) to `out`, added in fp32 and in the order of ranks.
template <typename T>
void add_slots(const Group& group, T* out, int64_t begin, int64_t end, int threads) {
  const T* first = reinterpret_cast<const T*>(group.slot(0));
  int64_t stride = group.slot_bytes() / static_cast<int64_t>(sizeof(T)), count = end - begin;
  for_runs(div_up(count, LANES), RUN, count * 4 > MIN_PARALLEL_BYTES ? threads : 1, [&](int64_t vector) {
    int64_t i = begin + vector * LANES, lanes = end - i < LANES ? end - i : LANES;
    Floats sum = load(first + i, lanes);
    for (int rank = 1; rank < group.size(); rank++) sum += load(first + rank * stride + i, lanes);
    store(out + i, sum, lanes);
  });
}

// Sums `count` elements, which fit a slot, in place.
template <typename T>
bool all_reduce_chunk(Group& group, T* data, int64_t count, int threads) {
  group.begin();
  T* own = reinterpret_cast<T*>(group.slot(group.rank()));
  std::memcpy(own, data, count * sizeof(T));
  if (!group.meet()) return false;
  if (count * static_cast<int64_t>(sizeof(T)) <= MAX_DIRECT_BYTES) {
    add_slots(group, data, 0, count, threads);
    return true;
  }
  int64_t line = LINE_BYTES / sizeof(T), part = div_up(div_up(count, group.size()), line) * line;
  auto start = [&](int rank) { return rank * part < count ? rank * part : count; };
  // In place: no other rank reads this part of this slot before the next meeting.
  add_slots(group, own, start(group.rank()), start(group.rank() + 1), threads);
  if (!group.meet()) return false;
  for (int rank = 0; rank < group.size(); rank++)
    std::memcpy(data + start(rank), reinterpret_cast<T*>(group.slot(rank)) + start(rank),
                (start(rank + 1) - start(rank)) * sizeof(T));
  return true;
}

// Calls exchange(offset, bytes) for consecutive pieces that fit a slot, until it returns false.
template <typename Exchange>
bool for_slots(int64_t bytes, int64_t slot_bytes, Exchange exchange) {
  for (int64_t offset = 0; offset < bytes; offset += slot_bytes)
    if (!exchange(offset, bytes - offset < slot_bytes ? bytes - offset : slot_bytes)) return false;
  return true;
}

}  // namespace

// These return 0 after the timeout, or if the group is aborted, which leaves `data` undefined.

// Sums data [count] over all ranks, in place. The bits are equal on all ranks, whatever the number of elements.
RTP_API int rtp_all_reduce(GroupState* state, int dtype, void* data, int64_t count, int threads) {
  Group group(state);
  bool done = true;
  with_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    constexpr int64_t size = sizeof(T);
    done = for_slots(count * size, group.slot_bytes(), [&](int64_t offset, int64_t bytes) {
      return all_reduce_chunk(group, static_cast<T*>(data) + offset / size, bytes / size, threads);
    });
  });
  return done;
}

// Copies the bytes of all ranks, in their order, to gathered [size, bytes] of rank 0; null on the others.
RTP_API int rtp_gather(GroupState* state, const void* data, void* gathered, int64_t bytes) {
  Group group(state);
  const char* from = static_cast<const char*>(data);
  char* to = static_cast<char*>(gathered);
  return for_slots(bytes, group.slot_bytes(), [&](int64_t offset, int64_t part) {
    group.begin();
    if (group.rank() != 0) std::memcpy(group.slot(group.rank()), from + offset, part);
    if (!group.meet()) return false;
    for (int rank = 0; rank < group.size() && to; rank++)
      std::memcpy(to + rank * bytes + offset, rank == 0 ? from + offset : group.slot(rank), part);
    return true;
  });
}

// Copies the bytes of rank 0 to `data` of the others.
RTP_API int rtp_broadcast(GroupState* state, void* data, int64_t bytes) {
  Group group(state);
  char* own = static_cast<char*>(data);
  return for_slots(bytes, group.slot_bytes(), [&](int64_t offset, int64_t part) {
    group.begin();
    if (group.rank() == 0) std::memcpy(group.slot(0), own + offset, part);
    if (!group.meet()) return false;
    if (group.rank() != 0) std::memcpy(own + offset, group.slot(0), part);
    return true;
  });
}
