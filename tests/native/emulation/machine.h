// Runs a grid on the CPU: blocks one after another, the threads of a block as fibers, each until it waits for others.
// What a GPU would answer with a hang, with anything at all or with a failed launch is a std::runtime_error that names
// the kernel, the block and the thread.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <mutex>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "fibers.h"

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  constexpr dim3(uint3 size) : x(size.x), y(size.y), z(size.z) {}
  constexpr operator uint3() const { return {x, y, z}; }
};

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace emulation {

// Of the blocks of a grid, the warps of a block and the lanes of a warp. Results that depend on it show a race.
enum class Order { forward, reverse, shuffle };

// Where a kernel calls something. (Not every compiler in use has std::source_location.)
struct Place {
  const char* file;
  int line;

  static constexpr Place here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
};

template <class... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

inline std::string text_of(uint3 index) { return text("(", index.x, ", ", index.y, ", ", index.z, ")"); }

inline std::string text_of(const char* what, const Place& where) {
  const std::string file = where.file;
  return text(what, " at ", file.substr(file.find_last_of('/') + 1), ":", where.line);
}

inline bool same(const Place& a, const Place& b) {
  return a.line == b.line && (a.file == b.file || std::strcmp(a.file, b.file) == 0);
}

enum class State { unstarted, runnable, at_barrier, in_warp, ended };

struct Thread {
  uint3 index;
  unsigned number;
  State state;
  // Whose stack it is on, from its first wait on.
  Fiber* fiber;
  // What it waits for.
  const char* what;
  Place where;
  // In a warp: the lanes that take part, the lane it reads, what it brings and what it gets.
  unsigned mask;
  int source;
  uint64_t given, taken;
  unsigned votes;
};

// Thrown through a thread that will never be served, so that nothing on its stack is lost.
struct Cancelled {};

struct SharedArray {
  const void* id;
  // Of memory of its own and of its exact size, so that AddressSanitizer sees what is beyond it.
  std::unique_ptr<char[]> data;
  uint64_t block;
};

class Machine {
 public:
  void set_order(Order order) {
    order_ = order;
    ordered_ = true;
  }

  void launch(const char* kernel, dim3 grid, dim3 block, void (*body)(const void*), const void* arguments) {
    check_limits(kernel, grid, block);
    const std::lock_guard<std::mutex> lock(mutex_);
    read_order();
    body_ = body;
    arguments_ = arguments;
    gridDim = grid;
    blockDim = block;
    random_.seed(1);
    shared_bytes_ = 0;
    failure_.clear();
    index_threads();
    run_blocks();
    shared_.clear();
    if (!failure_.empty()) throw std::runtime_error(text(kernel, ": block ", text_of(blockIdx), failure_));
  }

  // How many of the threads voted for it.
  unsigned barrier(const char* what, bool vote, const Place& where) {
    Thread& self = *current_;
    const unsigned count = static_cast<unsigned>(threads_.size());
    if (arrived_ == 0) {
      first_ = &self;
    } else if (first_->what != what || !same(first_->where, where)) {
      fail(text(text_of(what, where), ": thread ", text_of(first_->index), " waits in ",
                text_of(first_->what, first_->where)));
    }
    self.what = what;
    self.where = where;
    votes_ += vote;
    if (++arrived_ < count) {
      wait(State::at_barrier);
    } else {
      decided_ = votes_;
      arrived_ = votes_ = 0;
      for (Thread& thread : threads_) {
        if (&thread != &self) thread.state = State::runnable;
      }
    }
    return decided_;
  }

  int lane() const { return static_cast<int>(current_->number % warpSize); }

  // Waits for the lanes of the mask. Afterwards `taken` is what the lane `source` has given and `votes` has the bits of
  // the lanes that gave anything but zero.
  const Thread& exchange(const char* what, unsigned mask, uint64_t given, int source, const Place& where) {
    Thread& self = *current_;
    if (!(mask >> lane() & 1)) fail(text(text_of(what, where), ": ", mask_text(mask), " is without lane ", lane()));
    if (!(mask >> source & 1)) {
      fail(text(text_of(what, where), ": reads lane ", source, ", which is not in ", mask_text(mask)));
    }
    self.what = what;
    self.where = where;
    self.mask = mask;
    self.given = given;
    self.source = source;
    self.state = State::in_warp;
    unsigned& waiting = waiting_[self.number / warpSize];
    waiting |= 1u << lane();
    if ((waiting & mask) == mask && missing_lane(self) < 0) {
      serve(self);
      waiting &= ~mask;
    } else {
      wait(State::in_warp);
    }
    return self;
  }

  char* shared(const void* id, size_t size, size_t alignment) {
    auto found = std::find_if(shared_.begin(), shared_.end(), [&](const SharedArray& array) { return array.id == id; });
    if (found == shared_.end()) {
      shared_bytes_ = (shared_bytes_ + alignment - 1) / alignment * alignment + size;
      if (shared_bytes_ > MAX_SHARED) {
        fail(text("shared memory: got ", shared_bytes_, " bytes; allowed is up to ", MAX_SHARED));
      }
      shared_.push_back({id, std::unique_ptr<char[]>(new char[size]), 0});
      found = shared_.end() - 1;
    }
    if (found->block != block_) {
      // What a block has not written there is NaN.
      std::memset(found->data.get(), 0xff, size);
      found->block = block_;
    }
    return found->data.get();
  }

  // Ends the launch.
  [[noreturn]] static void fail(const std::string& reason) { throw std::runtime_error(reason); }

 private:
  static constexpr size_t MAX_SHARED = size_t{48} << 10;

  static void check_limits(const char* kernel, dim3 grid, dim3 block) {
    const auto within = [](dim3 size, unsigned x, unsigned y, unsigned z) {
      return 0 < size.x && size.x <= x && 0 < size.y && size.y <= y && 0 < size.z && size.z <= z;
    };
    if (!within(grid, 0x7fffffffu, 65535, 65535)) {
      fail(text(kernel, ": got a grid of ", text_of(grid), " blocks; allowed is 1 to (2147483647, 65535, 65535)"));
    }
    const uint64_t threads = uint64_t{block.x} * block.y * block.z;
    if (!within(block, 1024, 1024, 64) || threads > 1024) {
      fail(
          text(kernel, ": got a block of ", text_of(block), " threads; allowed is 1 to (1024, 1024, 64), in all 1024"));
    }
  }

  static std::string mask_text(unsigned mask) {
    std::ostringstream out;
    out << "mask 0x" << std::hex << mask;
    return out.str();
  }

  void read_order() {
    if (ordered_) return;
    const char* given = std::getenv("ALIGNFAST_EMULATION_ORDER");
    const std::string name = given == nullptr ? "" : given;
    if (name != "" && name != "forward" && name != "reverse" && name != "shuffle") {
      fail(text("ALIGNFAST_EMULATION_ORDER: got ", name, "; allowed is forward, reverse or shuffle"));
    }
    set_order(name == "reverse" ? Order::reverse : name == "shuffle" ? Order::shuffle : Order::forward);
  }

  // 0 .. count in the order of the day.
  void arrange(std::vector<unsigned>& items, uint64_t count) {
    items.resize(count);
    for (uint64_t i = 0; i < count; ++i) {
      items[i] = static_cast<unsigned>(order_ == Order::reverse ? count - 1 - i : i);
    }
    if (order_ == Order::shuffle) std::shuffle(items.begin(), items.end(), random_);
  }

  void index_threads() {
    threads_.resize(blockDim.x * blockDim.y * blockDim.z);
    for (unsigned i = 0; i < threads_.size(); ++i) {
      threads_[i].number = i;
      threads_[i].index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
    }
    arrange(lanes_, warpSize);
    arrange(warps_, (threads_.size() + warpSize - 1) / warpSize);
  }

  void run_blocks() {
    const uint64_t count = uint64_t{gridDim.x} * gridDim.y * gridDim.z;
    if (order_ == Order::shuffle) arrange(blocks_, count);
    for (uint64_t i = 0; i < count && failure_.empty(); ++i) {
      const uint64_t block = order_ == Order::shuffle ? blocks_[i] : order_ == Order::reverse ? count - 1 - i : i;
      blockIdx = {static_cast<unsigned>(block % gridDim.x), static_cast<unsigned>(block / gridDim.x % gridDim.y),
                  static_cast<unsigned>(block / gridDim.x / gridDim.y)};
      run_block();
    }
  }

  void run_block() {
    ++block_;
    arrived_ = votes_ = ended_ = 0;
    waiting_.assign(warps_.size(), 0);
    for (Thread& thread : threads_) thread.state = State::unstarted;
    bool moved = true;
    while (moved && failure_.empty()) {
      moved = false;
      // A warp goes on until all of it waits for other warps, so that what it does too early is seen by these.
      for (const unsigned warp : warps_) {
        while (failure_.empty() && run_warp(warp * warpSize)) moved = true;
      }
      if (order_ == Order::shuffle && ended_ < threads_.size()) {
        arrange(lanes_, lanes_.size());
        arrange(warps_, warps_.size());
      }
    }
    if (failure_.empty() && ended_ < threads_.size()) explain_standstill();
    if (!failure_.empty()) cancel();
  }

  // Every lane once, as far as it goes; whether any could.
  bool run_warp(unsigned first) {
    bool moved = false;
    warp_ = first;
    for (position_ = 0; position_ < warpSize && failure_.empty(); ++position_) {
      Thread* thread = thread_at(position_);
      if (thread == nullptr) continue;
      if (thread->state == State::unstarted) {
        current_ = thread;
        if (idle_.empty()) {
          fibers_.push_back(std::make_unique<Fiber>(&Machine::entry, fibers_.size()));
          idle_.push_back(fibers_.back().get());
        }
        Fiber* fiber = idle_.back();
        idle_.pop_back();
        enter(*fiber);
        moved = true;
      } else if (thread->state == State::runnable) {
        current_ = thread;
        enter(*thread->fiber);
        moved = true;
      }
    }
    return moved;
  }

  Thread* thread_at(int position) {
    const unsigned number = warp_ + lanes_[static_cast<size_t>(position)];
    return number < threads_.size() ? &threads_[number] : nullptr;
  }

  void enter(Fiber& fiber) {
    running_ = &fiber;
    threadIdx = current_->index;
    own_.enter(fiber);
  }

  void wait(State state) {
    Thread& self = *current_;
    self.state = state;
    self.fiber = running_;
    running_->leave(own_);
    if (!failure_.empty()) throw Cancelled();
  }

  static void entry();

  // Threads that never wait run one after another without a turn to the scheduler in between.
  void run_threads() {
    do {
      run_thread(*current_);
    } while (failure_.empty() && next_unstarted());
    idle_.push_back(running_);
    running_->leave(own_);
  }

  void run_thread(Thread& thread) {
    try {
      body_(arguments_);
    } catch (const Cancelled&) {
    } catch (const std::exception& error) {
      failure_ = text(", thread ", text_of(thread.index), ": ", error.what());
    }
    thread.state = State::ended;
    ++ended_;
  }

  bool next_unstarted() {
    if (position_ + 1 == warpSize) return false;
    Thread* thread = thread_at(position_ + 1);
    if (thread == nullptr || thread->state != State::unstarted) return false;
    ++position_;
    current_ = thread;
    threadIdx = thread->index;
    return true;
  }

  Thread* first_of_warp(const Thread& thread) { return &threads_[thread.number / warpSize * warpSize]; }

  // A lane of the thread's mask that does not wait with it, or -1.
  int missing_lane(const Thread& self) {
    const Thread* lanes = first_of_warp(self);
    const auto present = threads_.data() + threads_.size() - lanes;
    for (int i = 0; i < warpSize; ++i) {
      if (!(self.mask >> i & 1)) continue;
      if (i >= present) return i;
      const Thread& other = lanes[i];
      const bool together = other.state == State::in_warp && other.mask == self.mask && other.what == self.what &&
                            same(other.where, self.where);
      if (!together) return i;
    }
    return -1;
  }

  // What a warp whose lanes all wait has waited for.
  void serve(const Thread& self) {
    Thread* lanes = first_of_warp(self);
    const unsigned mask = self.mask;
    unsigned votes = 0;
    for (int i = 0; i < warpSize; ++i) {
      if (mask >> i & 1) votes |= static_cast<unsigned>(lanes[i].given != 0) << i;
    }
    for (int i = 0; i < warpSize; ++i) {
      if (!(mask >> i & 1)) continue;
      lanes[i].taken = lanes[lanes[i].source].given;
      lanes[i].votes = votes;
      lanes[i].state = State::runnable;
    }
  }

  void explain_standstill() {
    for (Thread& thread : threads_) {
      if (thread.state != State::in_warp) continue;
      const Thread* lanes = first_of_warp(thread);
      const int missing = missing_lane(thread);
      const bool exists = lanes + missing < threads_.data() + threads_.size();
      failure_ = text(", thread ", text_of(thread.index), ": ", text_of(thread.what, thread.where), ": lane ", missing,
                      " of ", mask_text(thread.mask), " ", exists ? whereabouts(lanes[missing]) : "does not exist");
      return;
    }
    for (Thread& thread : threads_) {
      if (thread.state != State::ended) continue;
      failure_ = text(", thread ", text_of(first_->index), ": ", text_of(first_->what, first_->where), ": thread ",
                      text_of(thread.index), " has ended");
      return;
    }
  }

  std::string whereabouts(const Thread& thread) const {
    if (thread.state == State::ended) return "has ended";
    const std::string place = "waits in " + text_of(thread.what, thread.where);
    return thread.state == State::in_warp ? place + " with " + mask_text(thread.mask) : place;
  }

  void cancel() {
    for (Thread& thread : threads_) {
      if (thread.state == State::unstarted || thread.state == State::ended) continue;
      current_ = &thread;
      enter(*thread.fiber);
    }
  }

  std::mutex mutex_;
  Order order_ = Order::forward;
  bool ordered_ = false;
  std::minstd_rand random_;

  void (*body_)(const void*) = nullptr;
  const void* arguments_ = nullptr;
  std::string failure_;

  std::vector<Thread> threads_;
  std::vector<unsigned> blocks_, warps_, lanes_;
  Thread* current_ = nullptr;
  // Of every warp, the lanes that wait for others of it.
  std::vector<unsigned> waiting_;
  // The first thread of the warp that runs, and the place in its lanes' order that the current one has.
  unsigned warp_ = 0;
  int position_ = 0;
  size_t ended_ = 0;

  unsigned arrived_ = 0, votes_ = 0, decided_ = 0;
  const Thread* first_ = nullptr;

  std::vector<SharedArray> shared_;
  size_t shared_bytes_ = 0;
  uint64_t block_ = 0;

  Fiber own_;
  Fiber* running_ = nullptr;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<Fiber*> idle_;
};

inline Machine machine;

inline void Machine::entry() {
  Fiber::started(machine.own_);
  for (;;) machine.run_threads();
}

inline void set_order(Order order) { machine.set_order(order); }

// Every thread gets copies of its own of the arguments.
template <class... Parameters>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block,
            std::type_identity_t<Parameters>... arguments) {
  const auto call = [&] { kernel(arguments...); };
  machine.launch(name, grid, block, [](const void* bound) { (*static_cast<const decltype(call)*>(bound))(); }, &call);
}

}  // namespace emulation
