// Counts the global traffic of a launch; emulator.h says by which model.
#pragma once

#include <algorithm>
#include <list>
#include <tuple>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "emulator.h"

namespace xsep::cuda::emulator {

constexpr int kSectorBytes = 32, kSectorsPerLine = 4;

class Cache {
 public:
  explicit Cache(int64_t bytes) : lines_(bytes / (kSectorBytes * kSectorsPerLine)) {}

  // Whether it had to fetch the sector.
  bool misses(uint64_t sector) {
    const uint64_t tag = sector / kSectorsPerLine;
    const unsigned bit = 1u << sector % kSectorsPerLine;
    const auto found = where_.find(tag);
    if (found != where_.end()) {
      used_.splice(used_.begin(), used_, found->second);
      const bool miss = !(used_.front().sectors & bit);
      used_.front().sectors |= bit;
      return miss;
    }
    if (lines_ == 0) return true;
    if (used_.size() == lines_) {
      where_.erase(used_.back().tag);
      used_.pop_back();
    }
    used_.push_front({tag, bit});
    where_[tag] = used_.begin();
    return true;
  }

 private:
  struct Line {
    uint64_t tag;
    unsigned sectors;
  };

  size_t lines_;
  std::list<Line> used_;  // the last used first
  std::unordered_map<uint64_t, std::list<Line>::iterator> where_;
};

struct Access {
  uint64_t sector;
  int warp, bytes;
  Direction direction;
  uint32_t epoch, time, site, turn;

  // What the lanes of one warp access have in common.
  auto key() const { return std::tie(warp, epoch, site, turn, direction); }
};

class Recorder {
 public:
  Recorder(const CacheModel& model, int threads) : model_(model), threads_(threads) {}

  void access(int thread, const void* p, int bytes, Direction direction, const Site& site) {
    const uint32_t id = std::find(sites_.begin(), sites_.end(), site) - sites_.begin();
    if (id == sites_.size()) sites_.push_back(site);
    Progress& progress = threads_[thread];
    if (progress.turns.size() <= id) progress.turns.resize(id + 1);
    const uint64_t sector = reinterpret_cast<uintptr_t>(p) / kSectorBytes;  // one: an access is aligned
    trace_.push_back(
        {sector, thread / warpSize, bytes, direction, progress.epoch, progress.time++, id, progress.turns[id]++});
  }

  // The thread met others at a barrier, a shuffle or a vote.
  void synchronized(int thread) {
    ++threads_[thread].epoch;
    threads_[thread].time = 0;
    threads_[thread].turns.clear();
  }

  void block_done(int64_t block) {
    Multiprocessor& multiprocessor = this->multiprocessor(block);
    std::sort(trace_.begin(), trace_.end(), [](const Access& a, const Access& b) { return a.key() < b.key(); });
    for (auto first = trace_.begin(); first != trace_.end();) {
      const auto last = std::find_if(first, trace_.end(), [&](const Access& a) { return a.key() != first->key(); });
      warp_access(first, last, multiprocessor.requests);
      first = last;
    }
    trace_.clear();
    for (Progress& progress : threads_) progress = {};
    if (++multiprocessor.blocks % model_.resident_blocks == 0) replay(multiprocessor);
  }

  // After the last block.
  void finish(Launch* launch) {
    for (auto& [number, multiprocessor] : multiprocessors_) replay(multiprocessor);
    launch->loads = traffic_[0];
    launch->stores = traffic_[1];
    launch->loads.distinct_sectors = distinct_[0].size();
    launch->stores.distinct_sectors = distinct_[1].size();
    launch->load_sectors_after_cache = misses_;
  }

 private:
  struct Progress {  // of a thread
    uint32_t epoch = 0, time = 0;
    std::vector<uint32_t> turns;  // at each site
  };
  struct Request {
    uint32_t epoch, time;
    uint64_t sector;
  };
  struct Multiprocessor {
    explicit Multiprocessor(int64_t cache_bytes) : cache(cache_bytes) {}

    Cache cache;
    int64_t blocks = 0;
    std::vector<Request> requests;  // of the blocks that run abreast
  };

  Multiprocessor& multiprocessor(int64_t block) {
    return multiprocessors_.try_emplace(block % model_.multiprocessors, model_.bytes).first->second;
  }

  void warp_access(std::vector<Access>::iterator first, std::vector<Access>::iterator last,
                   std::vector<Request>& requests) {
    const int direction = static_cast<int>(first->direction);
    uint32_t time = first->time;
    std::vector<uint64_t> sectors;
    for (auto access = first; access != last; ++access) {
      ++traffic_[direction].accesses[__builtin_ctz(access->bytes)];
      time = std::min(time, access->time);
      sectors.push_back(access->sector);
    }
    std::sort(sectors.begin(), sectors.end());
    sectors.erase(std::unique(sectors.begin(), sectors.end()), sectors.end());
    ++traffic_[direction].warp_accesses;
    traffic_[direction].sectors += sectors.size();
    distinct_[direction].insert(sectors.begin(), sectors.end());
    if (first->direction == Direction::kStore) return;
    for (const uint64_t sector : sectors) requests.push_back({first->epoch, time, sector});
  }

  void replay(Multiprocessor& multiprocessor) {
    std::vector<Request>& requests = multiprocessor.requests;
    std::stable_sort(requests.begin(), requests.end(), [](const Request& a, const Request& b) {
      return std::tie(a.epoch, a.time) < std::tie(b.epoch, b.time);
    });
    for (const Request& request : requests) misses_ += multiprocessor.cache.misses(request.sector);
    requests.clear();
  }

  const CacheModel model_;
  std::vector<Progress> threads_;
  std::vector<Site> sites_;
  std::vector<Access> trace_;                 // of this block
  Traffic traffic_[2];                        // by direction
  std::unordered_set<uint64_t> distinct_[2];  // sectors
  std::unordered_map<int64_t, Multiprocessor> multiprocessors_;
  int64_t misses_ = 0;
};

}  // namespace xsep::cuda::emulator
