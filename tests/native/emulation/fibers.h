// Stacks that one thread of the system runs functions on, turn by turn. A turn costs a few instructions and no call of
// the system.

#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#define AF_EMULATION_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define AF_EMULATION_ASAN 1
#endif
#endif

#if defined(AF_EMULATION_ASAN)
#include <sanitizer/common_interface_defs.h>
#endif

#if defined(AF_EMULATION_UCONTEXT) || !(defined(__x86_64__) || defined(__aarch64__))
#include <ucontext.h>
#define AF_EMULATION_PORTABLE 1
#elif defined(__x86_64__)
asm(R"(
  .pushsection .text.alignfast_emulation_switch,"axG",@progbits,alignfast_emulation_switch,comdat
  .weak alignfast_emulation_switch
  .hidden alignfast_emulation_switch
  .type alignfast_emulation_switch, @function
alignfast_emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  popq %rcx
  jmp *%rcx
  .size alignfast_emulation_switch, . - alignfast_emulation_switch
  .popsection
)");
#else
asm(R"(
  .pushsection .text.alignfast_emulation_switch,"axG",%progbits,alignfast_emulation_switch,comdat
  .weak alignfast_emulation_switch
  .hidden alignfast_emulation_switch
  .type alignfast_emulation_switch, %function
alignfast_emulation_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
  .size alignfast_emulation_switch, . - alignfast_emulation_switch
  .popsection
)");
#endif

#if !defined(AF_EMULATION_PORTABLE)
// Saves the registers that a function has to keep on the stack in use, whose address goes to *from, and takes up `to`.
extern "C" void alignfast_emulation_switch(void** from, void* to);
#endif

namespace emulation {

class Fiber {
 public:
  // What the thread of the system is on already.
  Fiber() = default;

  // `entry` never returns. It starts at the first turn. `number` should differ from fiber to fiber: if the same places
  // of all stacks were the same number of pages apart, they would compete for the same few lines of the cache.
  Fiber(void (*entry)(), size_t number) {
    mapped_ = mmap(nullptr, MAPPED, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapped_ == MAP_FAILED) throw std::bad_alloc();
    // Too deep a stack ends in memory that nobody may touch.
    mprotect(mapped_, GUARD, PROT_NONE);
    bottom_ = static_cast<char*>(mapped_) + GUARD;
    size_ = MAPPED - GUARD - number % COLOURS * COLOUR;
    prepare(entry);
  }

  ~Fiber() {
    if (mapped_ != nullptr) munmap(mapped_, MAPPED);
  }

  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // From the thread's own stack to a fiber; returns at that fiber's next leave().
  void enter(Fiber& fiber) { turn(*this, fiber); }

  // From a fiber back to where it was entered from.
  void leave(Fiber& own) { turn(*this, own); }

  // The first thing that an entry does.
  static void started(Fiber& own) {
#if defined(AF_EMULATION_ASAN)
    __sanitizer_finish_switch_fiber(nullptr, &own.bottom_, &own.size_);
#else
    static_cast<void>(own);
#endif
  }

 private:
  static constexpr size_t GUARD = size_t{1} << 16;
  static constexpr size_t MAPPED = GUARD + (size_t{1} << 18);
  static constexpr size_t COLOURS = 61, COLOUR = 320;

  static void turn(Fiber& from, Fiber& to) {
#if defined(AF_EMULATION_ASAN)
    __sanitizer_start_switch_fiber(&from.fake_stack_, to.bottom_, to.size_);
#endif
#if defined(AF_EMULATION_PORTABLE)
    swapcontext(&from.context_, &to.context_);
#else
    alignfast_emulation_switch(&from.top_, to.top_);
#endif
#if defined(AF_EMULATION_ASAN)
    const void* bottom;
    size_t size;
    __sanitizer_finish_switch_fiber(from.fake_stack_, &bottom, &size);
    // A fiber may be entered from another thread of the system than before.
    if (from.mapped_ != nullptr) {
      to.bottom_ = bottom;
      to.size_ = size;
    }
#endif
  }

#if defined(AF_EMULATION_PORTABLE)
  void prepare(void (*entry)()) {
    getcontext(&context_);
    context_.uc_stack.ss_sp = const_cast<void*>(bottom_);
    context_.uc_stack.ss_size = size_;
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
  }

  ucontext_t context_;
#else
  // As if `entry` had been about to be returned to.
  void prepare(void (*entry)()) {
    void** end = reinterpret_cast<void**>(static_cast<char*>(mapped_) + GUARD + size_);
#if defined(__x86_64__)
    // Six registers, the address and a frame's absent return address.
    void** frame = end - 8;
    frame[6] = reinterpret_cast<void*>(entry);
#else
    // Twelve registers, of which the last is the address, and eight for floating point.
    void** frame = end - 20;
    frame[11] = reinterpret_cast<void*>(entry);
#endif
    top_ = frame;
  }

  void* top_ = nullptr;
#endif

  void* mapped_ = nullptr;
  const void* bottom_ = nullptr;
  size_t size_ = 0;
#if defined(AF_EMULATION_ASAN)
  void* fake_stack_ = nullptr;
#endif
};

}  // namespace emulation
