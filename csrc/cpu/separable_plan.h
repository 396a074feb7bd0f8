// How a training block is cut into tiles, and where its memory lies.
#pragma once

#include <vector>

#include "../separable.h"
#include "plan.h"

namespace xsep::cpu {

// A step of backward down an image: the rows of dz it makes, and the rows of dx that it completes.  Of the rows of dz
// made before it has those from `kept` on.
struct Strip {
  Span dz, dx;
  int kept;
};

// Offsets into a workspace, each region rounded up to a cache line.
class Regions {
 public:
  explicit Regions(int64_t line) : line_(line) {}
  int64_t add(int64_t count) {
    const int64_t start = size_;
    size_ += (count + line_ - 1) / line_ * line_;
    return start;
  }
  int64_t size() const { return size_; }

 private:
  int64_t line_, size_ = 0;
};

constexpr int kTogether = 8;  // blocks of channels of a tensor that are read or written together, at most

struct SeparablePlan {
  explicit SeparablePlan(const SeparableArgs& args);

  // The depthwise convolution and its gradients, as the order and the packing of their filters need them.
  DepthwiseArgs fprop_args, grad_args;
  Plan fprop, grad;

  int block;             // kBlock
  int blocks, k_blocks;  // that cover C and K
  int64_t channels;      // of a pixel of z: blocks * block
  int depth;             // blocks of x and dx that are read and written together

  // Forward: tiles of y.  Backward: parts of the rows of an image, each of which a thread goes down in strips.
  Cut rows, cols;
  int strip_rows;
  int64_t items;  // tiles or parts of all images
  int groups;     // of tiles: what a thread that is free takes next, with statistics of its own
  int threads;
  int pixels;       // of the largest tile or strip
  int dz_rows = 0;  // that a strip holds

  std::vector<Strip> strips(int part) const;

  // Elements of the accumulation type.
  int64_t fprop_w, fprop_bias, fprop_affine, w_pw, shared;
  int64_t x_tile, z_tile, panels, per_thread;  // a thread's
  // In forward.
  int64_t bias = 0, statistics = 0;
  // In backward.
  int64_t grad_w = 0, grad_bias = 0, grad_affine = 0, y_affine = 0;
  int64_t dz_tile = 0, out_tile = 0, sums = 0, dw_pw = 0;

  int64_t workspace_elements() const { return shared + threads * per_thread; }

 private:
  void cut_forward(const SeparableArgs& args);
  void cut_backward(const SeparableArgs& args);
};

}  // namespace xsep::cpu
