#include "simt/scheduler.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <sstream>
#include <stdexcept>
#include <vector>

#include "simt/fiber.h"
#include "simt/launch_check.h"
#include "simt/queue.h"
#include "simt/sanitizer.h"
#include "simt/shared_memory.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace kvcore::simt {
namespace {

constexpr const char* kBarrier = "__syncthreads";

// Lanes of a warp that wait for the others of their mask.
struct Meeting {
  const Collective* collective = nullptr;  // null: free
  unsigned mask = 0, arrived = 0;
  std::source_location where;
  void* brought[kWarp] = {};
};

struct Warp {
  unsigned alive = 0;  // lanes that have not returned
  // Disjoint masks can be under way at once.
  Meeting meetings[kWarp];
};

struct Thread {
  Context* context = nullptr;
  uint3 index{};
  unsigned linear = 0;
  bool done = false;
  // What it waits for, for reports; null while it runs.
  const char* waits_in = nullptr;
  std::source_location where;
  Queue<PendingCopy, 512> copies;  // oldest first
  Queue<unsigned, 512> groups;     // copies in each committed group
  unsigned uncommitted = 0;        // newest copies, in no group yet

  Warp& warp() const;
};

struct Launch {
  const Work* work = nullptr;
  Context main;
  Context* switched_from = nullptr;
  Thread* current = nullptr;
  // Kept for the next launch; as many of one as of the other.
  std::vector<std::unique_ptr<Thread>> threads;
  std::vector<Context> contexts;
  unsigned rotation = 0;  // thread 0 runs on this context
  std::vector<Warp> warps;
  unsigned num_threads = 0, alive = 0;

  Queue<Thread*, kMaxThreads> ready;
  bool shuffled = false;
  std::minstd_rand random;

  unsigned barrier_arrived = 0;
  std::source_location barrier_where;
  bool barrier_open = false;
  unsigned barrier_round = 0;
  bool barrier_or[2] = {};

  unsigned char* smem = nullptr;
  size_t smem_bytes = 0;

  std::string failure;
};

Launch launch;
std::mutex one_launch;

Warp& Thread::warp() const { return launch.warps[linear / kWarp]; }

std::string format(const std::source_location& where) {
  const std::string file = where.file_name();
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(where.line());
}

bool same_place(const std::source_location& a, const std::source_location& b) {
  return a.line() == b.line() && a.column() == b.column() &&
         std::strcmp(a.file_name(), b.file_name()) == 0;
}

// ---- Scheduling

// Null if none is ready.
Thread* take_ready() {
  if (launch.ready.size() == 0) return nullptr;
  if (!launch.shuffled) return launch.ready.pop();
  std::swap(launch.ready[launch.random() % launch.ready.size()], launch.ready[0]);
  return launch.ready.pop();
}

void make_current(Thread* thread) {
  launch.current = thread;
  if (thread != nullptr) threadIdx = thread->index;
}

// The running thread waits until someone makes it ready.
void wait(const char* what, const std::source_location& where) {
  Thread* self = launch.current;
  self->waits_in = what;
  self->where = where;
  Thread* next = take_ready();
  make_current(next);
  launch.switched_from = self->context;
  switch_context(*self->context, next != nullptr ? *next->context : launch.main);
  self->waits_in = nullptr;
}

void wake(Thread* thread) { launch.ready.push(thread); }

// ---- Meetings

bool complete(const Meeting& meeting, const Warp& warp) {
  return meeting.arrived == (meeting.mask & warp.alive);
}

// Frees the meeting, then lets all but the running thread go on.
void conclude(Meeting& meeting, unsigned first_thread) {
  const unsigned lanes = meeting.arrived;
  if (meeting.collective->finish != nullptr) meeting.collective->finish(meeting.brought, lanes);
  meeting.collective = nullptr;
  for (unsigned i = 0; i < kWarp; ++i) {
    Thread* thread = (lanes >> i & 1) != 0 ? launch.threads[first_thread + i].get() : nullptr;
    if (thread != nullptr && thread != launch.current) wake(thread);
  }
}

void conclude_barrier() {
  launch.barrier_arrived = 0;
  launch.barrier_open = false;
  launch.barrier_or[++launch.barrier_round % 2] = false;
  for (unsigned i = 0; i < launch.num_threads; ++i) {
    Thread* thread = launch.threads[i].get();
    if (thread != launch.current && thread->waits_in == kBarrier) wake(thread);
  }
}

// ---- Life of a thread

// The last thing a thread does: those that only waited for it go on.
void retire() {
  Thread* self = launch.current;
  tsan_release(&launch.failure);
  self->done = true;
  --launch.alive;
  Warp& warp = self->warp();
  warp.alive &= ~(1u << self->linear % kWarp);
  launch.current = nullptr;
  for (Meeting& meeting : warp.meetings) {
    if (meeting.collective != nullptr && complete(meeting, warp)) {
      conclude(meeting, self->linear / kWarp * kWarp);
    }
  }
  if (launch.barrier_open && launch.barrier_arrived == launch.alive) conclude_barrier();
  Thread* next = take_ready();
  make_current(next);
  launch.switched_from = self->context;
  leave_context(*self->context, next != nullptr ? *next->context : launch.main);
}

void thread_main() {
  arrive(*launch.switched_from);
  tsan_acquire(&launch.smem);
  launch.work->call(launch.work->arguments);
  retire();
  __builtin_trap();  // a retired thread is never continued
}

// ---- Blocks

// The pattern is a NaN or a large number: a result that depends on it differs between seeds.
unsigned char poison() { return launch.shuffled && launch.random() % 2 == 0 ? 0x7f : 0xff; }

// Where everyone is stuck, one line for each place.
std::string describe_deadlock() {
  std::map<std::string, std::vector<unsigned>> places;
  for (unsigned i = 0; i < launch.num_threads; ++i) {
    const Thread& thread = *launch.threads[i];
    const std::string place =
        thread.done ? "returned" : std::string(thread.waits_in) + " at " + format(thread.where);
    places[place].push_back(i);
  }
  std::ostringstream out;
  out << "threads wait for each other forever:";
  for (const auto& [place, threads] : places) {
    out << "\n  " << threads.size() << " in " << place << ": thread";
    for (size_t i = 0; i < std::min<size_t>(threads.size(), 8); ++i) out << ' ' << threads[i];
    if (threads.size() > 8) out << " ...";
  }
  return out.str();
}

void start_threads(dim3 block) {
  while (launch.threads.size() < launch.num_threads) {
    launch.threads.push_back(std::make_unique<Thread>());
    launch.contexts.push_back(Context::with_stack());
  }
  launch.ready.clear();
  for (unsigned i = 0; i < launch.num_threads; ++i) {
    Thread& thread = *launch.threads[i];
    thread.linear = i;
    thread.index = {i % block.x, i / block.x % block.y, i / (block.x * block.y)};
    thread.done = false;
    thread.waits_in = nullptr;
    thread.copies.clear();
    thread.groups.clear();
    thread.uncommitted = 0;
    thread.context = &launch.contexts[(i + launch.rotation) % launch.contexts.size()];
    thread.context->start(&thread_main);
    launch.ready.push(&thread);
  }
  launch.warps.assign((launch.num_threads + kWarp - 1) / kWarp, Warp{});
  for (size_t w = 0; w < launch.warps.size(); ++w) {
    const unsigned lanes = std::min<unsigned>(kWarp, launch.num_threads - w * kWarp);
    const unsigned mask = lanes == kWarp ? kFullMask : (1u << lanes) - 1;
    launch.warps[w].alive = mask;
  }
  launch.alive = launch.num_threads;
  launch.barrier_arrived = 0;
  launch.barrier_open = false;
  launch.barrier_or[0] = launch.barrier_or[1] = false;
}

void run_block(dim3 block, SharedMemory& smem, size_t smem_bytes) {
  launch.smem = smem.data();
  launch.smem_bytes = smem_bytes;
  start_threads(block);
  tsan_release(&launch.smem);
  Thread* first = take_ready();
  make_current(first);
  launch.switched_from = &launch.main;
  switch_context(launch.main, *first->context);
  make_current(nullptr);
  if (launch.failure.empty() && launch.alive != 0) launch.failure = describe_deadlock();
  if (launch.failure.empty()) launch.failure = smem.damage();
}

void discard_threads() {
  for (Context& context : launch.contexts) context.free();
  launch.contexts.clear();
  launch.threads.clear();
}

uint64_t linear_size(dim3 grid) { return uint64_t{grid.x} * grid.y * grid.z; }

// Position of the i-th block in a shuffled grid: a full cycle, since the step and the number of
// blocks have no common divisor.
struct BlockOrder {
  uint64_t blocks, step = 1, offset = 0;
  explicit BlockOrder(uint64_t num_blocks) : blocks(num_blocks) {
    if (!launch.shuffled) return;
    offset = launch.random() % blocks;
    do {
      step = launch.random() % blocks + 1;
    } while (std::__gcd(step, blocks) != 1);
  }
  uint64_t operator()(uint64_t i) const {
    return static_cast<uint64_t>((static_cast<unsigned __int128>(i) * step + offset) % blocks);
  }
};

}  // namespace

void run(const Work& work, dim3 grid, dim3 block, size_t smem_bytes) {
  const std::string kernel = kernel_name(work.kernel);
  check_launch(kernel, grid, block, smem_bytes);
  const std::lock_guard lock(one_launch);
  record_launch(work.kernel);
  const char* seed = std::getenv("KVCORE_SIMT_SEED");
  launch.shuffled = seed != nullptr && *seed != '\0';
  // Mixed: neighbouring seeds of this generator begin alike.
  if (launch.shuffled) {
    launch.random.seed(static_cast<unsigned>(std::strtoul(seed, nullptr, 10)) * 2654435761u + 1);
  }
  launch.work = &work;
  launch.main = Context::of_thread();
  launch.num_threads = block.x * block.y * block.z;
  launch.failure.clear();
  gridDim = grid;
  blockDim = block;
  const uint64_t blocks = linear_size(grid);
  const BlockOrder order(blocks);
#if KVCORE_SIMT_TSAN
  // Blocks are not ordered, so memory that one has used cannot be handed to another in between.
  std::vector<std::unique_ptr<SharedMemory>> used;
#endif
  for (uint64_t i = 0; i < blocks && launch.failure.empty(); ++i) {
    const uint64_t linear = order(i);
    blockIdx = {static_cast<unsigned>(linear % grid.x),
                static_cast<unsigned>(linear / grid.x % grid.y),
                static_cast<unsigned>(linear / (uint64_t{grid.x} * grid.y))};
    auto smem = std::make_unique<SharedMemory>(smem_bytes, poison());
    run_block(block, *smem, smem_bytes);
#if KVCORE_SIMT_TSAN
    used.push_back(std::move(smem));
    // What ran on one context is ordered, so the thread of this number must run on another one in
    // the next block: the two blocks may be racing.
    launch.rotation += 13;
#endif
  }
  tsan_acquire(&launch.failure);
  launch.smem = nullptr;
  if (launch.failure.empty()) return;
  // Some were stopped in the middle.
  for (Context& context : launch.contexts) context.join();
  discard_threads();
  throw std::runtime_error(kernel + ", block " + format(blockIdx) + ": " + launch.failure);
}

unsigned char* shared_memory() { return launch.smem; }
size_t shared_memory_bytes() { return launch.smem_bytes; }

unsigned lane() { return launch.current->linear % kWarp; }

void fail(const std::string& message, const std::source_location& where) {
  Thread* self = launch.current;
  launch.failure = "thread " + format(self->index) + " at " + format(where) + ": " + message;
  tsan_release(&launch.failure);
  leave_context(*self->context, launch.main);
  __builtin_trap();
}

void block_barrier(const std::source_location& where) {
  if (!launch.barrier_open) {
    launch.barrier_open = true;
    launch.barrier_where = where;
  } else if (!same_place(launch.barrier_where, where)) {
    fail("__syncthreads in divergent code: other threads wait in the one at " +
             format(launch.barrier_where),
         where);
  }
  tsan_release(&launch.barrier_arrived);
  if (++launch.barrier_arrived == launch.alive) {
    conclude_barrier();
  } else {
    wait(kBarrier, where);
  }
  tsan_acquire(&launch.barrier_arrived);
}

bool block_barrier_or(bool predicate, const std::source_location& where) {
  // The one that is being collected is never the one that threads have yet to read: whoever comes
  // to the next barrier but one has left this one.
  bool& any = launch.barrier_or[launch.barrier_round % 2];
  any = any || predicate;
  block_barrier(where);
  return any;
}

void meet(const Collective& collective, unsigned mask, void* brought,
          const std::source_location& where) {
  Thread* self = launch.current;
  Warp& warp = self->warp();
  const unsigned lane = self->linear % kWarp;
  const auto named = [&](unsigned lanes) {
    std::ostringstream out;
    out << collective.name << " with mask 0x" << std::hex << lanes;
    return out.str();
  };
  if ((mask >> lane & 1) == 0) fail(named(mask) + " without the calling lane", where);
  if (collective.aligned && warp.alive != kFullMask) {
    fail(std::string(collective.name) + " in a warp of which lanes have returned or do not exist",
         where);
  }
  Meeting* meeting = nullptr;
  for (Meeting& other : warp.meetings) {
    if (other.collective == nullptr) continue;
    if (other.mask == mask && other.collective == &collective && same_place(other.where, where)) {
      meeting = &other;
    } else if ((other.mask >> lane & 1) != 0 && (other.arrived & mask) != 0) {
      // They wait for this lane, and it would wait for them.
      std::ostringstream out;
      out << collective.name << " in divergent code: lanes 0x" << std::hex << other.arrived
          << " of the warp wait in " << other.collective->name << " with mask 0x" << other.mask
          << " at " << format(other.where);
      fail(out.str(), where);
    }
  }
  if (meeting == nullptr) {
    for (Meeting& other : warp.meetings) {
      if (other.collective == nullptr) meeting = &other;
    }
    meeting->collective = &collective;
    meeting->mask = mask;
    meeting->arrived = 0;
    meeting->where = where;
    for (void*& b : meeting->brought) b = nullptr;
  }
  meeting->arrived |= 1u << lane;
  meeting->brought[lane] = brought;
  if (collective.orders_memory) tsan_release(meeting);
  if (complete(*meeting, warp)) {
    conclude(*meeting, self->linear / kWarp * kWarp);
  } else {
    wait(collective.name, where);
  }
  if (collective.orders_memory) tsan_acquire(meeting);
}

void begin_copy(const PendingCopy& copy, const std::source_location& where) {
  Thread& self = *launch.current;
  if (self.copies.full()) fail("more asynchronous copies under way than the shim can hold", where);
  self.copies.push(copy);
  ++self.uncommitted;
}

void commit_copies(const std::source_location& where) {
  Thread& self = *launch.current;
  if (self.groups.full()) fail("more groups of copies under way than the shim can hold", where);
  self.groups.push(self.uncommitted);
  self.uncommitted = 0;
}

void wait_copies(int pending, void (*land)(const PendingCopy& copy)) {
  Thread& self = *launch.current;
  while (self.groups.size() > static_cast<size_t>(pending)) {
    for (unsigned left = self.groups.pop(); left > 0; --left) land(self.copies.pop());
  }
}

}  // namespace kvcore::simt
