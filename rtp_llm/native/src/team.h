// Threads that share the tasks of a kernel.
//
// Not OpenMP, whose regions end only when every thread has come: if the system runs another process on a thread's core,
// all wait until it is back. Here a region ends with its last task, and a thread that comes late has missed it.
#pragma once
#include <cstdint>

// What a thread computes now, and next: -1 if that is not known. is_first: its `next` was -1 before this task.
struct Turn {
  int thread;  // 0 … threads - 1
  int64_t task, next;
  bool is_first;
};

using TaskFunction = void (*)(void* context, const Turn& turn);

// Runs the tasks 0 … count - 1 by this thread and up to threads - 1 others, which belong to it alone.
void run_team(int64_t count, int threads, TaskFunction function, void* context);

// Calls function(turn) for each of `count` tasks, in this thread and others; returns when all are done.
template <class Function>
void for_tasks(int64_t count, int threads, Function function) {
  if (threads > 1 && count > 1) {
    auto call = [](void* context, const Turn& turn) { (*static_cast<Function*>(context))(turn); };
    return run_team(count, threads, call, &function);
  }
  for (int64_t task = 0; task < count; task++) function(Turn{0, task, task + 1 < count ? task + 1 : -1, task == 0});
}

// Calls function(i) for 0 … count - 1, in runs of `run` that are computed by one thread each.
template <class Function>
void for_runs(int64_t count, int64_t run, int threads, Function function) {
  for_tasks((count + run - 1) / run, threads, [&](const Turn& turn) {
    int64_t end = turn.task * run + run < count ? turn.task * run + run : count;
    for (int64_t i = turn.task * run; i < end; i++) function(i);
  });
}
