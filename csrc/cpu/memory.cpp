#include "memory.h"

#include <algorithm>
#include <iterator>
#include <map>
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

constexpr int64_t kHugePage = 2 << 20, kGrowth = 64 << 20;
constexpr int64_t kStep = 4096;  // outputs begin and end at multiples of it

// What was released last is likely to be wanted next: so much of it is not offered to the kernel, since the offer costs
// as much as a convolution of some megabytes.
constexpr int64_t kHotBytes = 128 << 20;

enum class State { kHot, kOffered, kGone };  // kGone: it holds no memory

struct Piece {
  int64_t bytes;
  State state;
  int64_t released;  // the larger, the later
};

// Addresses from which outputs are cut.  They are reserved once, as many as four times the machine's memory, since what
// is free lies in pieces, and count as memory only as far as they were made writable (where the system accounts for
// it), or written.
struct Arena {
  std::mutex mutex;
  char* begin = nullptr;
  int64_t size = 0, writable = 0;
  int64_t end = 0;                  // nothing beyond it has been cut yet
  std::map<int64_t, Piece> pieces;  // that are free, by their offset
  std::unordered_map<void*, int64_t> used;
  int64_t waiting_bytes = 0, hot_bytes = 0, releases = 0;
  int64_t limit = static_cast<int64_t>(sysconf(_SC_PHYS_PAGES)) * sysconf(_SC_PAGESIZE) / 4;

  Arena() {
    const int64_t bytes = 16 * limit;
    void* const mapped =
        mmap(nullptr, bytes + kHugePage, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapped == MAP_FAILED) return;  // addresses are limited: they are left to others, and nothing is recycled
    const uintptr_t first = reinterpret_cast<uintptr_t>(mapped);
    begin = static_cast<char*>(mapped) + (kHugePage - first % kHugePage) % kHugePage;
    size = bytes;
    madvise(begin, size, MADV_HUGEPAGE);  // a wish: without huge pages it is only slower
  }

  // Neighbouring pieces make a run.  The smallest one that is large enough serves, or addresses beyond the end.
  char* cut(int64_t bytes) {
    int64_t found = -1, found_bytes = 0, offset = end;
    for (auto it = pieces.begin(); it != pieces.end();) {
      const int64_t first = it->first;
      int64_t next = first;
      for (; it != pieces.end() && it->first == next; ++it) next += it->second.bytes;
      if (next - first >= bytes && (found < 0 || next - first < found_bytes)) found = first, found_bytes = next - first;
      if (next == end) offset = first;
    }
    if (found >= 0) offset = found;
    if (bytes > size - offset || !make_writable(offset + bytes)) return nullptr;
    for (auto it = pieces.find(offset); it != pieces.end() && it->first < offset + bytes; it = pieces.erase(it)) {
      const Piece piece = it->second;
      count(piece, -1);
      const int64_t left = it->first + piece.bytes - offset - bytes;
      if (left > 0) add(offset + bytes, {left, piece.state, piece.released});
    }
    end = std::max(end, offset + bytes);
    return begin + offset;
  }

  void put_back(int64_t offset, int64_t bytes) {
    add(offset, {bytes, State::kHot, ++releases});
    while (hot_bytes > kHotBytes) change(oldest(State::kHot), State::kOffered);
    shrink(limit);
  }

  void shrink(int64_t bytes) {
    while (waiting_bytes > bytes) change(oldest(State::kOffered), State::kGone);
  }

 private:
  using Iterator = std::map<int64_t, Piece>::iterator;

  bool make_writable(int64_t bytes) {
    if (bytes <= writable) return true;
    const int64_t to = std::min(size, (bytes + kGrowth - 1) / kGrowth * kGrowth);
    if (mprotect(begin + writable, to - writable, PROT_READ | PROT_WRITE) != 0) return false;
    writable = to;
    return true;
  }

  void count(const Piece& piece, int sign) {
    if (piece.state == State::kHot) hot_bytes += sign * piece.bytes;
    if (piece.state != State::kGone) waiting_bytes += sign * piece.bytes;
  }

  void add(int64_t offset, const Piece& piece) {
    pieces[offset] = piece;
    count(piece, 1);
  }

  // That of the pieces up to a state which was released first.
  Iterator oldest(State state) {
    auto found = pieces.end();
    for (auto it = pieces.begin(); it != pieces.end(); ++it) {
      if (it->second.state > state) continue;
      if (found == pieces.end() || it->second.released < found->second.released) found = it;
    }
    return found;
  }

  // Offers a piece to the kernel or gives it back, in whole huge pages, for which it joins its likes.
  void change(Iterator it, State state) {
    const int64_t lo = it->first - kHugePage + 1, hi = it->first + it->second.bytes + kHugePage - 1;
    count(it->second, -1);
    it->second.state = state;
    count(it->second, 1);
    const auto joins = [](Iterator a, Iterator b) {
      return a->first + a->second.bytes == b->first && a->second.state == b->second.state;
    };
    if (it != pieces.begin() && joins(std::prev(it), it)) {
      --it;
      it->second.bytes += std::next(it)->second.bytes;
      pieces.erase(std::next(it));
    }
    if (std::next(it) != pieces.end() && joins(it, std::next(it))) {
      it->second.bytes += std::next(it)->second.bytes;
      pieces.erase(std::next(it));
    }
    const int64_t from = (std::max(it->first, lo) + kHugePage - 1) / kHugePage * kHugePage;
    const int64_t to = std::min(it->first + it->second.bytes, hi) / kHugePage * kHugePage;
    if (to > from) madvise(begin + from, to - from, state == State::kOffered ? MADV_FREE : MADV_DONTNEED);
  }
};

// Never destroyed: tensors may outlive static objects.
Arena& arena() {
  static Arena* const a = [] {
    auto* created = new Arena;
    // A child process must not inherit a lock that some other thread of its parent held.
    pthread_atfork([] { arena().mutex.lock(); }, [] { arena().mutex.unlock(); }, [] { arena().mutex.unlock(); });
    return created;
  }();
  return *a;
}

}  // namespace

bool recycles() { return arena().begin != nullptr; }

void* allocate(int64_t bytes) {
  Arena& a = arena();
  if (!a.begin || bytes > a.size) return nullptr;
  bytes = (bytes + kStep - 1) / kStep * kStep;
  std::lock_guard<std::mutex> lock(a.mutex);
  void* const memory = a.cut(bytes);
  if (memory) a.used[memory] = bytes;
  return memory;
}

void release(void* memory) {
  Arena& a = arena();
  std::lock_guard<std::mutex> lock(a.mutex);
  const auto found = a.used.find(memory);
  if (found == a.used.end()) return;
  const int64_t bytes = found->second;
  a.used.erase(found);
  a.put_back(static_cast<char*>(memory) - a.begin, bytes);
}

void set_limit(int64_t bytes) {
  Arena& a = arena();
  std::lock_guard<std::mutex> lock(a.mutex);
  a.limit = std::max<int64_t>(0, bytes);
  a.shrink(a.limit);
}

int64_t waiting_bytes() {
  Arena& a = arena();
  std::lock_guard<std::mutex> lock(a.mutex);
  return a.waiting_bytes;
}

void release_waiting() {
  Arena& a = arena();
  std::lock_guard<std::mutex> lock(a.mutex);
  a.shrink(0);
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
