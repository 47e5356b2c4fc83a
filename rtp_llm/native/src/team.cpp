#include "team.h"

#include <linux/futex.h>
#include <pthread.h>
#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <climits>
#include <system_error>
#include <thread>
#include <vector>

#include "spin.h"

namespace {

// Longer than the pauses between the kernels of a step; beyond it another process may need the core.
constexpr double SPIN_SECONDS = 50e-6;
constexpr int THREAD_BITS = 16;

// A number that threads wait for in the kernel.
class Event {
 public:
  uint32_t value() const { return value_.load(); }

  // Sleeps while the number is `value`.
  void wait(uint32_t value) {
    has_sleepers_ = true;
    if (value_ == value) syscall(SYS_futex, &value_, FUTEX_WAIT_PRIVATE, value, nullptr, nullptr, 0);
  }

  // Changes the number, and wakes those who sleep.
  void signal() {
    value_++;
    if (has_sleepers_.exchange(false)) syscall(SYS_futex, &value_, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
  }

 private:
  std::atomic<uint32_t> value_{0};
  std::atomic<bool> has_sleepers_{false};
};

// The helpers of one thread, which calls kernels.
class Team {
 public:
  ~Team() {
    is_ending_ = true;
    published_.signal();
    for (std::thread& helper : helpers_)
      if (getpid() == process_) helper.join();
      else helper.detach();  // a child of the process has this memory, but not the threads
  }

  void run(int64_t count, int threads, TaskFunction function, void* context) {
    threads = reserve(static_cast<int>(std::min<int64_t>(threads, count)));
    count_ = count, function_ = function, context_ = context;
    num_done_.store(0, std::memory_order_relaxed);
    tickets_.store(static_cast<uint64_t>(count) << THREAD_BITS | static_cast<uint64_t>(threads));
    published_.signal();
    take_tasks(0);
    auto is_done = [&] { return num_done_.load(std::memory_order_acquire) == count_; };
    while (!spin_until(is_done, SPIN_SECONDS)) {
      // A helper has lost its core in the middle of a task. On this one it would go on.
      uint32_t finished = finished_.value();
      if (!is_done()) finished_.wait(finished);
    }
  }

 private:
  // Starts helpers for so many threads. Returns how many there are with the caller; fewer where the system permits no
  // more.
  int reserve(int threads) {
    sigset_t all, before;
    if (static_cast<int>(helpers_.size()) + 1 >= threads) return threads;
    sigfillset(&all);  // signals are for the threads of the program
    pthread_sigmask(SIG_SETMASK, &all, &before);
    try {
      for (int thread = static_cast<int>(helpers_.size()) + 1; thread < threads; thread++)
        helpers_.emplace_back([this, thread] { help(thread); });
    } catch (const std::system_error&) {
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    return static_cast<int>(helpers_.size()) + 1;
  }

  void help(int thread) {
    for (;;) {
      uint32_t published = published_.value();
      if (is_ending_) return;
      take_tasks(thread);
      auto is_called = [&] { return published_.value() != published; };
      if (!spin_until(is_called, SPIN_SECONDS)) published_.wait(published);
    }
  }

  void take_tasks(int thread) {
    int64_t ahead = -1;  // taken, but not computed yet
    for (;;) {
      bool is_first = ahead < 0;
      int64_t task = is_first ? take(thread, false) : ahead;
      if (task < 0) return;
      ahead = take(thread, true);
      int64_t count = count_;
      function_(context_, Turn{thread, task, ahead, is_first});
      if (num_done_.fetch_add(1, std::memory_order_acq_rel) + 1 == count) finished_.signal();
    }
  }

  // Returns the next task, -1 if there is none for this thread. In advance: only while there is one for each thread.
  // Whoever holds a task may read what `run` has published, which lasts until all tasks are done.
  int64_t take(int thread, bool in_advance) {
    uint64_t tickets = tickets_.load();
    for (;;) {
      uint64_t left = tickets >> THREAD_BITS, threads = tickets & ((1 << THREAD_BITS) - 1);
      if (left < (in_advance ? threads : 1) || static_cast<uint64_t>(thread) >= threads) return -1;
      if (tickets_.compare_exchange_weak(tickets, tickets - (1 << THREAD_BITS)))
        return count_ - static_cast<int64_t>(left);
    }
  }

  std::vector<std::thread> helpers_;
  alignas(128) std::atomic<uint64_t> tickets_{0};  // tasks that nobody has taken, and threads that may
  alignas(128) std::atomic<int64_t> num_done_{0};
  alignas(128) Event published_;
  Event finished_;
  std::atomic<bool> is_ending_{false};
  const pid_t process_ = getpid();
  int64_t count_ = 0;
  TaskFunction function_ = nullptr;
  void* context_ = nullptr;
};

}  // namespace

void run_team(int64_t count, int threads, TaskFunction function, void* context) {
  thread_local Team team;
  team.run(count, threads, function, context);
}
