// The host emulator: the block that runs, and the checks.
#include "emulator.h"

#include <cxxabi.h>
#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <utility>

#include "emulator_fiber.h"
#include "emulator_traffic.h"

namespace xsep::cuda::emulator {
namespace {

std::string to_string(const uint3& v) {
  return "(" + std::to_string(v.x) + ", " + std::to_string(v.y) + ", " + std::to_string(v.z) + ")";
}

std::string to_string(const Site& site) {
  return std::string(site.function) + " (" + site.file + ":" + std::to_string(site.line) + ")";
}

std::string hexadecimal(uint64_t value) {
  char text[19];
  std::snprintf(text, sizeof text, "0x%llx", static_cast<unsigned long long>(value));
  return text;
}

// Its name where the dynamic symbol table has it, else nothing.
std::string name_of(const void* kernel) {
  Dl_info info;
  if (!dladdr(kernel, &info) || info.dli_saddr != kernel || !info.dli_sname) return "";
  int status;
  const std::unique_ptr<char, void (*)(void*)> name(abi::__cxa_demangle(info.dli_sname, nullptr, nullptr, &status),
                                                    std::free);
  return name ? name.get() : info.dli_sname;
}

enum class State : uint8_t { kNew, kReady, kAtBarrier, kAtWarp, kReturned };

struct Copy {
  void* to;
  int bytes;
  unsigned char data[16];
};

struct Thread {
  uint3 index;
  Fiber* fiber;  // that holds it while it waits
  Site site;     // where it waits
  WarpOp op;     // and for what
  unsigned mask;
  int source;
  uint64_t value, result;
  std::vector<Copy> copies;
  std::vector<size_t> groups;  // the number of copies up to the end of each
};

struct Cancelled {};  // unwinds the stacks of the threads that wait when another one failed

class Machine {
 public:
  Machine() {
    if (const char* order = std::getenv("XSEP_EMULATE_ORDER")) set_order(order);
  }

  void set_order(const std::string& order) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (order == "ascending" || order == "descending") {
      order_ = order == "ascending" ? Order::kAscending : Order::kDescending;
    } else if (!order.empty() && order.find_first_not_of("0123456789") == std::string::npos) {
      order_ = Order::kShuffled;
      seed_ = std::strtoul(order.c_str(), nullptr, 10);
    } else {
      throw std::invalid_argument("the order of threads is ascending, descending or the seed of a shuffle; got " +
                                  order);
    }
  }

  void start_counting(const CacheModel& model) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (model.bytes < 0 || model.multiprocessors < 1 || model.resident_blocks < 1) {
      throw std::invalid_argument("a cache model needs bytes >= 0, multiprocessors >= 1 and resident_blocks >= 1");
    }
    model_ = model;
    launches_.clear();
    block.counting = true;
  }

  std::vector<Launch> stop_counting() {
    const std::lock_guard<std::mutex> lock(mutex_);
    block.counting = false;
    return std::exchange(launches_, {});
  }

  void run(const Config& config) {
    const std::lock_guard<std::mutex> lock(mutex_);
    config_ = config;
    check_limits();
    gridDim = config.grid;
    blockDim = config.block;
    prepare_threads();
    struct Reset {
      ~Reset() {
        machine->recorder_.reset();
        block.shared = block.shared_bytes = 0;
      }
      Machine* machine;
    } reset{this};
    // Of exactly the size asked for, so that AddressSanitizer sees what lies beyond.
    const std::unique_ptr<unsigned char[]> shared(new unsigned char[config.shared_bytes]);
    block.shared = reinterpret_cast<uintptr_t>(shared.get());
    block.shared_bytes = config.shared_bytes;
    if (block.counting) recorder_ = std::make_unique<Recorder>(model_, size_);
    random_.seed(seed_);

    const int64_t blocks = int64_t{config.grid.x} * config.grid.y * config.grid.z;
    int64_t start = 0, step = 1;
    if (recorder_) {
      // In the order of the hardware, whatever that of the threads.
    } else if (order_ == Order::kDescending) {
      start = step = blocks - 1;
    } else if (order_ == Order::kShuffled) {
      start = random_() % blocks;
      do {
        step = random_() % blocks + 1;
      } while (std::gcd(step, blocks) != 1);  // else some would be left out
    }
    for (int64_t i = 0, b = start; i < blocks; ++i, b = (b + step) % blocks) {
      blockIdx = {static_cast<unsigned>(b % config.grid.x), static_cast<unsigned>(b / config.grid.x % config.grid.y),
                  static_cast<unsigned>(b / config.grid.x / config.grid.y)};
      std::memset(shared.get(), 0xff, config.shared_bytes);
      run_block();
      if (recorder_) recorder_->block_done(b);
    }
    if (recorder_) {
      launches_.push_back({name_of(config.kernel), config.grid, config.block, config.shared_bytes});
      recorder_->finish(&launches_.back());
    }
  }

  void check_global(const void* p, int bytes, Direction direction, const Site& site) {
    const auto at = reinterpret_cast<uintptr_t>(p);
    const char* const what = direction == Direction::kStore ? "store" : "load";
    if (at % bytes != 0) {
      fail(std::string("misaligned ") + what + " of " + std::to_string(bytes) + " bytes at " + hexadecimal(at), site);
    }
    if (at - block.shared < block.shared_bytes) fail(std::string("global ") + what + " of shared memory", site);
    if (recorder_) recorder_->access(current_, p, bytes, direction, site);
  }

  void barrier(const Site& site) {
    threads_[current_].site = site;
    states_[current_] = State::kAtBarrier;
    if (++at_barrier_ == size_) {
      for (int t = 0; t < size_; ++t) {
        if (!(threads_[t].site == site)) throw divergence();
      }
      std::fill(states_.begin(), states_.end(), State::kReady);
      start_round();
    }
    park();
  }

  uint64_t exchange(WarpOp op, unsigned mask, uint64_t value, int source, const Site& site) {
    const int lane = current_ % warpSize, first = current_ - lane;
    Thread* const lanes = &threads_[first];
    if (!(mask >> lane & 1)) fail("a lane that is not in its own mask " + hexadecimal(mask), site);
    Thread& me = threads_[current_];
    me.site = site;
    me.op = op;
    me.mask = mask;
    me.source = source;
    me.value = value;
    states_[current_] = State::kAtWarp;
    unsigned& waiting = waiting_[first / warpSize];
    waiting |= 1u << lane;
    // A warp at the end of a block may lack lanes; as on a device, nobody waits for them.
    const int present = std::min(warpSize, size_ - first);
    const unsigned named = present == warpSize ? mask : mask & ((1u << present) - 1);
    bool complete = (waiting & named) == named;
    unsigned votes = 0;
    for (int i = 0; complete && i < present; ++i) {
      if (!(named >> i & 1)) continue;
      complete = lanes[i].op == op && lanes[i].mask == mask && lanes[i].site == site;
      votes |= unsigned{lanes[i].value != 0} << i;
    }
    if (complete) {
      waiting &= ~named;
      for (int i = 0; i < present; ++i) {
        if (!(named >> i & 1)) continue;
        states_[first + i] = State::kReady;
        // The value of a lane that does not take part is undefined: NaN.
        const int from = lanes[i].source;
        lanes[i].result = op == WarpOp::kVote ? votes : named >> from & 1 ? lanes[from].value : ~uint64_t{0};
      }
      // On a device a warp may run to the next barrier before the others begin, or abreast with them, as in a shuffle.
      if (order_ == Order::kAscending) cursor_ = first;
      if (order_ == Order::kDescending) cursor_ = size_ - first - present;
    }
    park();
    return me.result;
  }

  void copy_async(void* shared, const void* global, int bytes, const Site& site) {
    const auto to = reinterpret_cast<uintptr_t>(shared);
    if (to - block.shared >= block.shared_bytes) fail("copy_async() to what is not shared memory", site);
    if (to % bytes != 0) fail("misaligned copy_async() of " + std::to_string(bytes) + " bytes to shared memory", site);
    global_access(global, bytes, Direction::kLoad, site);
    Copy copy{shared, bytes, {}};
    std::memcpy(copy.data, global, bytes);
    std::memset(shared, 0xff, bytes);  // nobody may read it from now on until it has arrived
    threads_[current_].copies.push_back(copy);
  }

  void tma_init(uint64_t* barrier, const Site& site) {
    check_barrier(barrier, site);
    tma_barriers_[barrier] = {};
  }

  // The copy takes place when the first thread waits for it: until then its destination is NaN.
  void tma_load(void* shared, const Box& box, uint64_t* barrier, int bytes, const Site& site) {
    TmaBarrier& state = known_barrier(barrier, site);
    const auto to = reinterpret_cast<uintptr_t>(shared);
    const int64_t row_bytes = box.size[0] * box.element_bytes, box_bytes = row_bytes * box.size[1];
    const auto require = [&](bool holds, const std::string& what) {
      if (!holds) fail("tma_load() " + what, site);
    };
    require(!state.to, "to a barrier whose last box nobody has waited for");
    require(to - block.shared + box_bytes <= block.shared_bytes && to >= block.shared, "beyond shared memory");
    require(to % 128 == 0, "to what is not aligned to 128 bytes");
    require(row_bytes % 16 == 0, "of a box whose channels are not a multiple of 16 bytes");
    require(box.size[0] > 0 && box.size[0] <= 256 && box.size[1] > 0 && box.size[1] <= 256,
            "of a box of more than 256 elements along an axis");
    require(reinterpret_cast<uintptr_t>(box.data) % 16 == 0, "of a tensor that is not aligned to 16 bytes");
    for (int i = 0; i < 4; ++i) {
      require(i == 0 || box.strides[i] % 16 == 0, "of a tensor whose strides are not multiples of 16 bytes");
      require(box.extents[i] > 0, "of an empty tensor");
      require(i == 0 || (box.strides[i] >= box.strides[i - 1] * box.extents[i - 1] &&
                         (i == 1 || box.strides[i] % box.strides[i - 1] == 0)),
              "of a tensor whose axes overlap or do not nest");
    }
    require(bytes == box_bytes, "that expects " + std::to_string(bytes) + " bytes, of a box of " +
                                    std::to_string(box_bytes) + ": who waits for it would do so for ever");
    std::memset(shared, 0xff, box_bytes);
    state.to = static_cast<unsigned char*>(shared);
    state.box = box;
  }

  void tma_wait(uint64_t* barrier, int parity, const Site& site) {
    TmaBarrier& state = known_barrier(barrier, site);
    if (parity != state.boxes % 2) return;  // that one is there
    if (!state.to) fail("tma_wait() for a box that nobody has asked for", site);
    const Box& b = state.box;
    const auto inside = [&](int axis, int64_t i) {
      return b.from[axis] + i >= 0 && b.from[axis] + i < b.extents[axis];
    };
    const bool row_exists = inside(2, 0) && inside(3, 0);
    for (int w = 0; w < b.size[1]; ++w) {
      for (int c = 0; c < b.size[0]; ++c, state.to += b.element_bytes) {
        if (!row_exists || !inside(1, w) || !inside(0, c)) {
          std::memset(state.to, 0, b.element_bytes);
          continue;
        }
        int64_t at = (b.from[0] + c) * b.strides[0] + (b.from[1] + w) * b.strides[1];
        at += b.from[2] * b.strides[2] + b.from[3] * b.strides[3];
        std::memcpy(state.to, static_cast<const unsigned char*>(b.data) + at, b.element_bytes);
      }
    }
    state.to = nullptr;
    ++state.boxes;
  }

  void copies_done() {
    copies_group();
    copies_done_but(0);
  }

  void copies_group() { threads_[current_].groups.push_back(threads_[current_].copies.size()); }

  void copies_done_but(size_t newest) {
    std::vector<Copy>& copies = threads_[current_].copies;
    std::vector<size_t>& groups = threads_[current_].groups;
    if (groups.size() <= newest) return;
    const size_t done = groups[groups.size() - newest - 1];
    for (size_t i = 0; i < done; ++i) std::memcpy(copies[i].to, copies[i].data, copies[i].bytes);
    copies.erase(copies.begin(), copies.begin() + done);
    groups.erase(groups.begin(), groups.end() - newest);
    for (size_t& end : groups) end -= done;
  }

 private:
  enum class Order { kAscending, kDescending, kShuffled };

  struct TmaBarrier {
    int64_t boxes = 0;            // that have arrived
    unsigned char* to = nullptr;  // of the one that is under way
    Box box;
  };

  void check_barrier(uint64_t* barrier, const Site& site) {
    const auto at = reinterpret_cast<uintptr_t>(barrier);
    if (at - block.shared >= block.shared_bytes) fail("a barrier for boxes that is not in shared memory", site);
    if (at % 8 != 0) fail("a misaligned barrier for boxes", site);
  }
  TmaBarrier& known_barrier(uint64_t* barrier, const Site& site) {
    const auto found = tma_barriers_.find(barrier);
    if (found == tma_barriers_.end()) fail("a barrier for boxes that nobody has made ready", site);
    return found->second;
  }

  void check_limits() {
    const auto require = [&](bool fits, const char* what, const dim3& got) {
      if (fits) return;
      throw Error("launch" + of_kernel() + ": " + what + "; got " + to_string({got.x, got.y, got.z}));
    };
    const dim3 &g = config_.grid, &b = config_.block;
    require(g.x > 0 && g.y > 0 && g.z > 0, "the grid is empty", g);
    require(g.x <= INT32_MAX && g.y <= 65535 && g.z <= 65535, "the grid is beyond 2^31-1, 65535, 65535 blocks", g);
    require(b.x > 0 && b.y > 0 && b.z > 0, "the block is empty", b);
    require(b.x <= 1024 && b.y <= 1024 && b.z <= 64 && b.x * b.y * b.z <= 1024, "more than 1024 threads in a block", b);
    if (config_.shared_bytes > kSharedLimit) {
      throw Error("launch" + of_kernel() + ": a block has at most " + std::to_string(kSharedLimit) +
                  " bytes of shared memory; got " + std::to_string(config_.shared_bytes));
    }
  }

  void prepare_threads() {
    const dim3& b = config_.block;
    size_ = b.x * b.y * b.z;
    threads_.resize(std::max<size_t>(threads_.size(), size_));
    states_.resize(size_);
    waiting_.resize((size_ + warpSize - 1) / warpSize);
    sequence_.resize(size_);
    std::iota(sequence_.begin(), sequence_.end(), 0);
    if (order_ == Order::kDescending) std::reverse(sequence_.begin(), sequence_.end());
    for (unsigned t = 0; t < static_cast<unsigned>(size_); ++t) {
      threads_[t].index = {t % b.x, t / b.x % b.y, t / b.x / b.y};
    }
  }

  // From the first thread of the order on.
  void start_round() {
    cursor_ = 0;
    at_barrier_ = 0;
    if (order_ == Order::kShuffled) std::shuffle(sequence_.begin(), sequence_.end(), random_);
  }

  void run_block() {
    std::fill(states_.begin(), states_.end(), State::kNew);
    std::fill(waiting_.begin(), waiting_.end(), 0);
    returned_ = 0;
    tma_barriers_.clear();
    start_round();
    while (returned_ < size_ && !error_) {
      bool moved = false;
      while (cursor_ < size_ && !error_) {
        const int t = sequence_[cursor_];
        if (states_[t] == State::kNew) {
          idle_fiber()->enter();  // and moves the cursor
          moved = true;
        } else {
          ++cursor_;
          if (states_[t] != State::kReady) continue;
          resume(t);
          moved = true;
        }
      }
      cursor_ = 0;
      if (!moved && !error_) error_ = std::make_exception_ptr(divergence());
    }
    if (error_) {
      for (int t = 0; t < size_; ++t) {
        if (states_[t] != State::kNew && states_[t] != State::kReturned) resume(t);
      }
      std::rethrow_exception(std::exchange(error_, nullptr));
    }
  }

  Fiber* idle_fiber() {
    if (idle_.empty()) {
      fibers_.push_back(std::make_unique<Fiber>(run_fiber));
      return fibers_.back().get();
    }
    Fiber* const fiber = idle_.back();
    idle_.pop_back();
    return fiber;
  }

  // A fiber runs one new thread after another, on the same stack, until one of them waits.
  static void run_fiber();

  void run_threads() {
    for (;;) {
      while (!error_ && cursor_ < size_ && states_[sequence_[cursor_]] == State::kNew) run_thread(sequence_[cursor_++]);
      Fiber* const fiber = Fiber::active();
      idle_.push_back(fiber);
      fiber->leave();
    }
  }

  void run_thread(int t) {
    become(t);
    threads_[t].copies.clear();
    threads_[t].groups.clear();
    try {
      config_.body(config_.arguments);
    } catch (const Cancelled&) {
    } catch (...) {
      if (!error_) error_ = std::current_exception();
    }
    states_[current_] = State::kReturned;
    ++returned_;
  }

  void become(int t) {
    current_ = t;
    threadIdx = threads_[t].index;
  }

  void park() {
    const int t = current_;
    Thread& thread = threads_[t];
    if (recorder_) recorder_->synchronized(t);
    thread.fiber = Fiber::active();
    thread.fiber->leave();
    if (error_) throw Cancelled{};
  }

  void resume(int t) {
    become(t);
    threads_[t].fiber->enter();
  }

  [[noreturn]] void fail(const std::string& what, const Site& site) {
    throw Error(what + " in " + to_string(site) + of_kernel() + ", block " + to_string(blockIdx) + ", thread " +
                to_string(threadIdx));
  }

  std::string of_kernel() {
    const std::string name = name_of(config_.kernel);
    return name.empty() ? "" : " of " + name;
  }

  // Threads wait for others that are elsewhere.  Says where each is.
  Error divergence() {
    struct Group {
      std::string place;
      int threads;
      uint3 first;
    };
    std::vector<Group> groups;
    for (int t = 0; t < size_; ++t) {
      const Thread& thread = threads_[t];
      std::string place = "returned";
      if (states_[t] == State::kAtBarrier) place = "at __syncthreads() in " + to_string(thread.site);
      if (states_[t] == State::kAtWarp) {
        const char* const ops[] = {"a shuffle", "a vote", "__syncwarp()"};
        place = std::string("at ") + ops[static_cast<int>(thread.op)] + " of lanes " + hexadecimal(thread.mask) +
                " in " + to_string(thread.site);
      }
      const auto same = std::find_if(groups.begin(), groups.end(), [&](const Group& g) { return g.place == place; });
      if (same == groups.end()) {
        groups.push_back({place, 1, thread.index});
      } else {
        ++same->threads;
      }
    }
    std::string text = "divergent threads" + of_kernel() + " in block " + to_string(blockIdx) + ":";
    for (const Group& group : groups) {
      text += "\n  " + std::to_string(group.threads) + " from thread " + to_string(group.first) + " on: " + group.place;
    }
    return Error(text);
  }

  static constexpr size_t kSharedLimit = 227 * 1024;  // of sm_90

  std::mutex mutex_;
  Order order_ = Order::kAscending;
  unsigned long seed_ = 0;
  std::mt19937_64 random_;
  CacheModel model_;
  std::vector<Launch> launches_;
  std::unique_ptr<Recorder> recorder_;

  Config config_;  // of the launch
  int size_;       // threads in a block
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<Fiber*> idle_;

  std::vector<Thread> threads_;  // of the block
  std::map<uint64_t*, TmaBarrier> tma_barriers_;
  std::vector<State> states_;
  std::vector<unsigned> waiting_;  // lanes of each warp
  std::vector<int> sequence_;      // the order of threads
  int cursor_, current_, at_barrier_, returned_;
  std::exception_ptr error_;
};

Machine& machine() {
  static Machine* const machine = new Machine;  // never destroyed: kernels may run while the process ends
  return *machine;
}

void Machine::run_fiber() { machine().run_threads(); }

}  // namespace

int64_t Traffic::bytes() const {
  int64_t sum = 0;
  for (int i = 0; i < 5; ++i) sum += accesses[i] << i;
  return sum;
}

void set_order(const std::string& order) { machine().set_order(order); }
void start_counting(const CacheModel& cache) { machine().start_counting(cache); }
std::vector<Launch> stop_counting() { return machine().stop_counting(); }
void run(const Config& config) { machine().run(config); }
void check_global(const void* p, int bytes, Direction direction, const Site& site) {
  machine().check_global(p, bytes, direction, site);
}
void barrier(const Site& site) { machine().barrier(site); }
uint64_t exchange(WarpOp op, unsigned mask, uint64_t value, int source, const Site& site) {
  return machine().exchange(op, mask, value, source, site);
}
void copy_async(void* shared, const void* global, int bytes, const Site& site) {
  machine().copy_async(shared, global, bytes, site);
}
void copies_done() { machine().copies_done(); }
void copies_group() { machine().copies_group(); }
void copies_done_but(int newest) { machine().copies_done_but(newest); }
void tma_init(uint64_t* barrier, const Site& site) { machine().tma_init(barrier, site); }
void tma_load(void* shared, const Box& box, uint64_t* barrier, int bytes, const Site& site) {
  machine().tma_load(shared, box, barrier, bytes, site);
}
void tma_wait(uint64_t* barrier, int parity, const Site& site) { machine().tma_wait(barrier, parity, site); }

}  // namespace xsep::cuda::emulator
