// What the driver (depthwise.cpp) asks of an instruction set.  Plain data only: this header is compiled once per
// instruction set, and an inline function here would leak wide code into the others.
//
// T is the element type of the tensors, A the type that products are accumulated in (float, or double for double).
#pragma once

#include <cstddef>

namespace xsep::cpu {

// Channels of a block, neighbours in filters, sums and staged tiles: a cache line of the accumulation type.
template <class A>
constexpr int kBlock = 64 / static_cast<int>(sizeof(A));

// u = relu(scale * (x - center) + shift); applies if `any`.  NHWC: kBlock numbers each.  NCHW: one number each.
template <class A>
struct Affine {
  bool any, relu;
  const A *center, *scale, *shift;
};

// Gradient of the loss with respect to u, on its way out, becomes that with respect to x; the sums for the gradients of
// scale and shift come out of the same pass.  x has the strides of dx's tile in `x_row` and `x_pixel`.
template <class A>
struct AffineGrad {
  Affine<A> affine;
  const void* x;
  ptrdiff_t x_row, x_pixel;
  A *dscale, *dshift;  // NHWC: kBlock numbers each.  NCHW: one number each.  Null: not wanted.
};

// NHWC: pixels of kBlock neighbouring channels, of which the tensor has `lanes`.  The arithmetic
// reads either several blocks of the tensor itself or a staged tile of one: [rows][cols][kBlock] of A, zeros where the
// tensor ends.  Filters and sums are kept per block.

template <class A>
struct StageNhwc {
  const void* src;                     // first pixel of the window
  ptrdiff_t row, pixel, lane;          // strides of src in elements
  int rows, cols;                      // of the tile
  int row_lo, row_hi, col_lo, col_hi;  // window of the tile that the tensor covers; zeros elsewhere
  int lanes;
  Affine<A> affine;
  A* tile;
};

// Where an array of pixels lies, and which of them an output (i, j) meets with its tap (r, s):
// row first_row + i * step_row + r * tap_row and column first_col + j * step_col + s * tap_col; none beyond the extents.
struct PixelsNhwc {
  const void* data;  // pixel (0, 0)
  ptrdiff_t row, pixel;
  int rows, cols;
  int first_row, first_col, step_row, step_col, tap_row, tap_col;
};

// out[i][j] = init + sum over taps (r, s) of in(i, j, r, s) * weights[r][s]
template <class A>
struct ConvNhwc {
  PixelsNhwc in;
  int tap_rows, tap_cols;
  const A* weights;           // [tap_rows][tap_cols][kBlock]
  ptrdiff_t weights_step;     // from block to block
  const A* init;              // [blocks][kBlock]; null: out's own values, of type A
  void* out;
  ptrdiff_t out_row, out_pixel;
  int rows, cols, blocks;
  bool stream;  // out is aligned to cache lines and too large to stay in the caches
};

// dw[r][s] += sum over (i, j) of dy[i][j] * x(i, j, r, s)
template <class A>
struct WgradNhwc {
  PixelsNhwc x;
  int tap_rows, tap_cols;
  const void* dy;
  ptrdiff_t dy_row, dy_pixel;
  int rows, cols, blocks;
  A* dw;              // [tap_rows][tap_cols][kBlock]
  ptrdiff_t dw_step;  // from block to block
  bool stream;        // x and dy do not fit into the caches
};

template <class A>
struct StoreNhwc {
  const A* tile;  // [rows][cols][kBlock]
  void* dst;
  ptrdiff_t row, pixel, lane;  // strides of dst in elements
  int rows, cols, lanes;
  AffineGrad<A> grad;
};

// NCHW: a tile is one plane, split by the residues of row and column modulo the strides, so that every tap of a strided
// filter is a contiguous read.  Element (i, j) lies at ((i % sh) * sw + j % sw) * plane + (i / sh) * pitch + j / sw.

template <class A>
struct StageNchw {
  const void* src;
  ptrdiff_t row;  // stride of src in elements
  int rows, cols;
  int row_lo, row_hi, col_lo, col_hi;
  int stride_h, stride_w;
  ptrdiff_t pitch, plane;
  ptrdiff_t size;  // of the tile with its slack, all of which is written
  Affine<A> affine;
  A* tile;
};

// out[i] = init + sum over t of tile[i + taps[t]] * weights[t] for i < count; out and tile have kSlack spare elements.
template <class A>
struct ConvNchw {
  const A* tile;
  const ptrdiff_t* taps;
  const A* weights;
  int tap_count;
  A init;
  A* out;
  ptrdiff_t count;
};

// dw[t] += sum over i < count of dy[i] * x[i + taps[t]]
template <class A>
struct WgradNchw {
  const A* x;
  const ptrdiff_t* taps;
  int tap_count;
  const A* dy;
  ptrdiff_t count;
  A* dw;
};

// dst[i][j] = tile[(j % phases) * plane + i * pitch + j / phases]
template <class A>
struct StoreNchw {
  const A* tile;
  ptrdiff_t pitch, plane;
  int phases;
  void* dst;
  ptrdiff_t row;
  int rows, cols;
  AffineGrad<A> grad;
};

constexpr int kSlack = 16;  // elements by which a vector loop may run past the end of an NCHW tile

// Functions for one element type T.  The convolutions of NHWC exist twice: on the tensor, and on staged tiles of A.
template <class A>
struct Kernels {
  void (*stage_nhwc)(const StageNhwc<A>&);
  void (*store_nhwc)(const StoreNhwc<A>&);
  void (*conv_nhwc)(const ConvNhwc<A>&);
  void (*conv_staged_nhwc)(const ConvNhwc<A>&);
  void (*wgrad_nhwc)(const WgradNhwc<A>&);
  void (*wgrad_staged_nhwc)(const WgradNhwc<A>&);
  void (*stage_nchw)(const StageNchw<A>&);
  void (*store_nchw)(const StoreNchw<A>&);
  void (*conv_nchw)(const ConvNchw<A>&);
  void (*wgrad_nchw)(const WgradNchw<A>&);
};

struct Isa {
  const char* name;
  Kernels<float> float32, float16, bfloat16;
  Kernels<double> float64;
};

// One definition per instruction set, each in a compilation of kernels.cpp with its own flags.
namespace scalar { extern const Isa isa; }
namespace avx2 { extern const Isa isa; }
namespace avx512 { extern const Isa isa; }
namespace avx512_bf16 { extern const Isa isa; }

}  // namespace xsep::cpu
