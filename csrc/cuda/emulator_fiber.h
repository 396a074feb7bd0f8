// A second stack to run a function on, which another function enters and leaves many times.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <new>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#if defined(__has_feature) && !defined(__SANITIZE_ADDRESS__)
#if __has_feature(address_sanitizer)
#define __SANITIZE_ADDRESS__
#endif
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace xsep::cuda::emulator {

#if defined(__x86_64__)

// Where a stack was left: its top, on which lie the registers that a call preserves.
using Context = void*;

// (swapcontext() does the same, with two system calls.)
__attribute__((naked, noinline)) inline void switch_context(Context* /*from*/, Context* /*to*/) {
  asm("pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n"
      "movq (%rsi), %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n"
      "ret");
}

inline void make_context(Context* context, char* bottom, size_t bytes, void (*start)()) {
  void** const top = reinterpret_cast<void**>(bottom + bytes);  // of zeros: six registers,
  top[-2] = reinterpret_cast<void*>(start);                     // where to go, and the end of a debugger's trace
  *context = top - 8;
}

#else

using Context = ucontext_t;

inline void switch_context(Context* from, Context* to) { swapcontext(from, to); }

inline void make_context(Context* context, char* bottom, size_t bytes, void (*start)()) {
  getcontext(context);
  context->uc_stack.ss_sp = bottom;
  context->uc_stack.ss_size = bytes;
  makecontext(context, start, 0);
}

#endif

class Fiber {
 public:
  // The function never returns.
  explicit Fiber(void (*function)()) : function_(function) {
    const size_t page = sysconf(_SC_PAGESIZE);
    void* const memory = mmap(nullptr, page + kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    mprotect(memory, page, PROT_NONE);  // who needs more stack stops here
    bottom_ = static_cast<char*>(memory) + page;
    make_context(&context_, bottom_, kBytes, start);
  }
  Fiber(const Fiber&) = delete;
  ~Fiber() {
    const size_t page = sysconf(_SC_PAGESIZE);
    munmap(bottom_ - page, page + kBytes);
  }

  // Goes there, until it leaves.
  void enter() {
    active_ = this;
    void* fake_stack;
    before_switch(&fake_stack, bottom_, kBytes);
    switch_context(&host_, &context_);
    after_switch(fake_stack, nullptr, nullptr);
  }

  // Goes back to who entered it.
  void leave() {
    void* fake_stack;
    before_switch(&fake_stack, host_bottom_, host_bytes_);
    switch_context(&context_, &host_);
    after_switch(fake_stack, &host_bottom_, &host_bytes_);
  }

  static Fiber* active() { return active_; }

 private:
  static constexpr size_t kBytes = 256 * 1024;  // only pages that were touched take memory

  static void start() {
    after_switch(nullptr, &active_->host_bottom_, &active_->host_bytes_);
    active_->function_();
  }

  // AddressSanitizer has to know on which stack it is.
#if defined(__SANITIZE_ADDRESS__)
  static void before_switch(void** fake_stack, const void* bottom, size_t bytes) {
    __sanitizer_start_switch_fiber(fake_stack, bottom, bytes);
  }
  static void after_switch(void* fake_stack, const void** old_bottom, size_t* old_bytes) {
    __sanitizer_finish_switch_fiber(fake_stack, old_bottom, old_bytes);
  }
#else
  static void before_switch(void** fake_stack, const void*, size_t) { *fake_stack = nullptr; }
  static void after_switch(void*, const void**, size_t*) {}
#endif

  inline static Fiber* active_ = nullptr;
  void (*function_)();
  char* bottom_;
  Context context_, host_;
  const void* host_bottom_ = nullptr;  // of the stack of who entered
  size_t host_bytes_ = 0;
};

}  // namespace xsep::cuda::emulator
