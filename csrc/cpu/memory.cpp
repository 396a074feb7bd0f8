#include "memory.h"

#include <algorithm>
#include <iterator>
#include <list>
#include <mutex>
#include <unordered_map>

#if defined(__linux__)
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace xsep::cpu {

#if defined(__linux__) && defined(MADV_FREE) && defined(MADV_HUGEPAGE)

namespace {

constexpr int64_t kHugePage = 2 << 20;

// What was released last is likely to be wanted next: so much of it is not offered to the kernel, since the offer costs
// as much as a convolution of some megabytes.
constexpr int64_t kHotBytes = 128 << 20;

// A mapping that begins at a huge page.
char* map(int64_t bytes) {
  void* const mapped = mmap(nullptr, bytes + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) return nullptr;
  char* const begin = static_cast<char*>(mapped);
  const int64_t before = (kHugePage - reinterpret_cast<uintptr_t>(begin) % kHugePage) % kHugePage;
  if (before) munmap(begin, before);
  munmap(begin + before + bytes, kHugePage - before);
  madvise(begin + before, bytes, MADV_HUGEPAGE);  // a wish: without huge pages it is only slower
  return begin + before;
}

struct Block {
  char* memory;
  int64_t bytes;
  bool hot;
};

struct Pool {
  std::mutex mutex;
  std::unordered_map<void*, int64_t> used;
  std::list<Block> waiting;  // those released last come first, and are the hot ones
  int64_t waiting_bytes = 0, hot_bytes = 0, used_bytes = 0;
  int64_t most_used = 0;  // at any time since all that waited was given back
  int64_t limit = static_cast<int64_t>(sysconf(_SC_PHYS_PAGES)) * sysconf(_SC_PAGESIZE) / 4;

  void add(Block block) {
    waiting.push_front(block);
    waiting_bytes += block.bytes;
    hot_bytes += block.bytes;
    for (auto it = waiting.rbegin(); hot_bytes > kHotBytes && it != waiting.rend(); ++it) {
      if (!it->hot) continue;
      madvise(it->memory, it->bytes, MADV_FREE);
      it->hot = false;
      hot_bytes -= it->bytes;
    }
    shrink(limit);
  }

  Block take(std::list<Block>::iterator it) {
    const Block block = *it;
    waiting.erase(it);
    waiting_bytes -= block.bytes;
    if (block.hot) hot_bytes -= block.bytes;
    return block;
  }

  // A new mapping.  What waits in sizes that nobody asked for makes room: used and waiting memory together stay what
  // was once in use, so that a program's peak is that of its tensors.
  char* map_new(int64_t bytes) {
    shrink(std::max<int64_t>(0, most_used - used_bytes - bytes));
    char* memory = map(bytes);
    if (!memory) {
      shrink(0);
      memory = map(bytes);
    }
    return memory;
  }

  void shrink(int64_t bytes) {
    while (waiting_bytes > bytes) {
      const Block block = take(std::prev(waiting.end()));
      munmap(block.memory, block.bytes);
    }
  }
};

// Never destroyed: tensors may outlive static objects.
Pool& pool() {
  static Pool* const p = [] {
    auto* created = new Pool;
    // A child process must not inherit a lock that some other thread of its parent held.
    pthread_atfork([] { pool().mutex.lock(); }, [] { pool().mutex.unlock(); }, [] { pool().mutex.unlock(); });
    return created;
  }();
  return *p;
}

}  // namespace

bool recycles() { return true; }

void* allocate(int64_t bytes) {
  static const int64_t page = sysconf(_SC_PAGESIZE);
  bytes = (bytes + page - 1) / page * page;
  Pool& p = pool();
  std::lock_guard<std::mutex> lock(p.mutex);
  auto best = p.waiting.end();
  for (auto it = p.waiting.begin(); it != p.waiting.end(); ++it) {
    if (it->bytes >= bytes && it->bytes <= bytes + bytes / 4 && (best == p.waiting.end() || it->bytes < best->bytes)) {
      best = it;
    }
  }
  Block block{nullptr, bytes, false};
  if (best != p.waiting.end()) {
    block = p.take(best);
  } else {
    block.memory = p.map_new(bytes);
    if (!block.memory) return nullptr;
  }
  p.used[block.memory] = block.bytes;
  p.used_bytes += block.bytes;
  p.most_used = std::max(p.most_used, p.used_bytes);
  return block.memory;
}

void release(void* memory) {
  Pool& p = pool();
  std::lock_guard<std::mutex> lock(p.mutex);
  const auto found = p.used.find(memory);
  if (found == p.used.end()) return;
  const Block block{static_cast<char*>(memory), found->second, true};
  p.used.erase(found);
  p.used_bytes -= block.bytes;
  p.add(block);
}

void set_limit(int64_t bytes) {
  Pool& p = pool();
  std::lock_guard<std::mutex> lock(p.mutex);
  p.limit = bytes;
  p.shrink(bytes);
}

int64_t waiting_bytes() {
  Pool& p = pool();
  std::lock_guard<std::mutex> lock(p.mutex);
  return p.waiting_bytes;
}

void release_waiting() {
  Pool& p = pool();
  std::lock_guard<std::mutex> lock(p.mutex);
  p.shrink(0);
  p.most_used = p.used_bytes;
}

#else

bool recycles() { return false; }
void* allocate(int64_t) { return nullptr; }
void release(void*) {}
void set_limit(int64_t) {}
int64_t waiting_bytes() { return 0; }
void release_waiting() {}

#endif

}  // namespace xsep::cpu
