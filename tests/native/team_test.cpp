// Runs regions of tasks from several threads at once, and from a child process. Prints what is wrong; exits with 1.
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <thread>
#include <vector>

#include "../../rtp_llm/native/src/team.h"

namespace {

void check(bool is_right, const char* what) {
  if (is_right) return;
  std::printf("wrong: %s\n", what);
  std::exit(1);
}

void run_region(int64_t count, int threads, int64_t work) {
  std::vector<int> runs(count), by_thread(threads);  // not atomic: the team must make the writes visible
  std::vector<int64_t> expected(threads, -1);
  for_tasks(count, threads, [&](const Turn& turn) {
    check(turn.thread >= 0 && turn.thread < threads, "number of a thread");
    check(turn.is_first == (expected[turn.thread] < 0), "is_first");
    check(turn.is_first || expected[turn.thread] == turn.task, "the task that was announced is the next one");
    expected[turn.thread] = turn.next;
    for (volatile int64_t i = 0; i < work; i = i + 1) {
    }
    runs[turn.task]++;
    by_thread[turn.thread]++;
  });
  int64_t total = 0;
  for (int n : runs) check(n == 1, "a task runs once");
  for (int n : by_thread) total += n;
  check(total == count, "every task has a thread");
}

void run_regions(unsigned seed, int regions) {
  std::mt19937 random(seed);
  for (int i = 0; i < regions; i++)
    run_region(random() % 40, 1 + static_cast<int>(random() % 5), random() % 10 ? 0 : 20000);
  int64_t sum = 0, next = 0;
  for_runs(1000, 7, 1, [&](int64_t i) { sum += i == next++; });
  check(sum == 1000, "runs are in order");
}

}  // namespace

int main(int argc, char**) {
  std::vector<std::thread> callers;
  for (unsigned seed = 0; seed < 3; seed++) callers.emplace_back(run_regions, seed, 500);
  for (std::thread& caller : callers) caller.join();
  run_regions(3, 500);
  usleep(1000);  // helpers sleep then
  run_regions(4, 20);
  if (argc > 1) return 0;  // under a sanitizer, which does not follow children
  pid_t child = fork();
  if (child == 0) {
    run_regions(5, 20);
    std::exit(0);
  }
  int status = 1;
  check(waitpid(child, &status, 0) == child && status == 0, "a child computes without the helpers");
  run_regions(6, 20);
  return 0;
}
