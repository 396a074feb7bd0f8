// What the driver (depthwise.cpp) asks of an instruction set.  Plain data only: this header is compiled once per
// instruction set, and an inline function here would leak wide code into the others.
//
// T is the element type of the tensors, A the type that products are accumulated in (float, or double for double).
#pragma once

#include <cstddef>
#include <cstdint>

namespace xsep::cpu {

// Channels of a block, neighbours in filters, sums and staged tiles: a cache line of the accumulation type.
template <class A>
constexpr int kBlock = 64 / static_cast<int>(sizeof(A));

// u = relu(scale * (x - center) + shift); applies if `any`.  kBlock numbers each.
template <class A>
struct Affine {
  bool any, relu;
  const A *center, *scale, *shift;
};

// Gradient of the loss with respect to u, on its way out, becomes that with respect to x; the sums for the gradients of
// scale and shift come out of the same pass.  x's strides are in elements.
template <class A>
struct AffineGrad {
  Affine<A> affine;
  const void* x;
  ptrdiff_t x_row, x_pixel, x_lane;
  A *dscale, *dshift;  // kBlock numbers each.  Null: not wanted.
  ptrdiff_t step;      // of both from block to block
};

// A tile is some rows and columns of one image and some blocks of kBlock channels: staged as
// [rows][cols][blocks][kBlock] of A, block by block, with zeros for the channels that the tensor, which has `lanes` of
// a block, lacks.  NCHW tensors are always staged, transposed on the way in and out, and so the arithmetic knows one
// layout; of NHWC tensors it reads several blocks in place where it can.

template <class A>
struct Stage {
  const void* src;             // first pixel of the tile
  ptrdiff_t row, pixel, lane;  // strides of src in elements; NHWC or `pixel` 1
  int rows, cols, lanes;       // more than kBlock: several blocks of an NHWC tensor
  ptrdiff_t ahead;             // from src to what will be staged next, in elements: it is asked for in advance
  Affine<A> affine;
  A* tile;                           // its first pixel of this block
  ptrdiff_t tile_pixel, tile_block;  // its strides
  bool add;                          // to what the tile has
};

// Where an array of pixels lies, and which of them an output (i, j) meets with its tap (r, s):
// row first_row + i * step_row + r * tap_row and column first_col + j * step_col + s * tap_col; none beyond the
// extents.
struct Pixels {
  const void* data;  // pixel (0, 0)
  ptrdiff_t row, pixel;
  int rows, cols;
  int first_row, first_col, step_row, step_col, tap_row, tap_col;
};

// out[i][j] = init + sum over taps (r, s) of in(i, j, r, s) * weights[r][s]
template <class A>
struct Conv {
  Pixels in;
  int tap_rows, tap_cols;
  const A* weights;        // [tap_rows][tap_cols][kBlock]
  ptrdiff_t weights_step;  // from block to block
  const A* init;           // [blocks][kBlock]; null: out's own values, of type A
  void* out;
  ptrdiff_t out_row, out_pixel;
  int rows, cols, blocks;
  ptrdiff_t last;  // from the first channel of the first block to that of the last; in between they are neighbours
  bool far;        // in and out are so large that it pays to ask for what is needed next
  bool stream;     // out is aligned to cache lines and too large to stay in the caches
};

// dw[r][s] += sum over (i, j) of dy[i][j] * x(i, j, r, s)
template <class A>
struct Wgrad {
  Pixels x;
  int tap_rows, tap_cols;
  const void* dy;
  ptrdiff_t dy_row, dy_pixel;
  int rows, cols, blocks;
  ptrdiff_t last;     // as in Conv
  A* dw;              // [tap_rows][tap_cols][kBlock]
  ptrdiff_t dw_step;  // from block to block
  bool far;           // as in Conv
  bool stream;        // x and dy do not fit into the caches
};

template <class A>
struct Store {
  const A* tile;
  ptrdiff_t tile_pixel, tile_block;
  void* dst;
  ptrdiff_t row, pixel, lane;  // strides of dst in elements; NHWC or `pixel` 1
  int rows, cols, lanes;       // more than kBlock: several blocks of an NHWC tensor
  AffineGrad<A> grad;
  void* planes;  // NCHW, if dst is too large to stay in the caches: memory for the tile as it will lie in dst, or null
};

// c(m, panel) (+)= sum over k of a(m, k) * b[panel][k], lines of kBlock numbers.  a lies in panels too: a(m, k) is
// a[k / kBlock][m][k % kBlock], or, transposed, a[m / kBlock][k][m % kBlock].
template <class A>
struct Gemm {
  const A* a;
  ptrdiff_t a_panel;
  bool transposed;
  const A* b;
  ptrdiff_t b_panel;
  A* c;
  ptrdiff_t c_panel;
  int rows, depth, panels;
  bool add;
};

// A panel of products becomes clamp(product + bias), rounded to T.  Its statistics join those of the `count` numbers
// that each lane has had before: m2 is the sum of the squared deviations from the mean.
template <class A>
struct Finish {
  A* panel;  // [rows][kBlock]
  int rows;
  const A* bias;  // [kBlock] or null
  A low, high;
  double *mean, *m2;  // [kBlock]; or null
  double count;
};

// A row of residual_sum.h: windows of tap_rows x tap_cols pixels of y, BatchNorm of the largest, the other branch.
template <class A>
struct ResidualRow {
  Pixels y;  // first_row: of the window; first_col: of the first window
  int tap_rows, tap_cols;
  int cols, channels;
  bool relu;
  const A *center, *scale, *shift;
  const void* skip;  // null: none
  ptrdiff_t skip_pixel;
  const A *skip_center, *skip_scale, *skip_shift;  // null: skip as it is
  void* out;
  ptrdiff_t out_pixel;
};

// Its gradients.  What is null is not wanted.
template <class A>
struct ResidualRowGrad {
  ResidualRow<A> row;  // out and skip_shift are not used, shift with relu; skip is null where it has no vectors
  const void* dout;
  ptrdiff_t dout_pixel;
  A* choice;  // [cols][channels]: which tap of its window was the largest, or kNoTap where the ReLU gave zero; or null,
              // where a window is one pixel:
  void* dy;   // a row of dy
  void* dskip;                       // and one of dskip, as dense as out
  A *dshift, *dscale, *dskip_scale;  // added to; [channels]
  A* sums;                           // memory for those of the row: short sums are exact
};

constexpr int kNoTap = -1;

// A row of dy: each pixel gets dout of the windows that chose it.  Row p of `choice` is p % choice_rows.
template <class A>
struct Unpool {
  const void* dout;
  ptrdiff_t dout_row, dout_pixel;
  const A* choice;
  int choice_rows;
  int row, cols, channels;  // of dy
  int out_rows, out_cols;
  int tap_rows, tap_cols, step_row, step_col, pad_row, pad_col;
  const A* scale;
  void* dy;
};

// Functions for one element type T.  The convolutions exist twice: on an NHWC tensor, and on staged tiles of A.
template <class A>
struct Kernels {
  void (*stage_nhwc)(const Stage<A>&);
  void (*stage_nchw)(const Stage<A>&);
  void (*conv)(const Conv<A>&);
  void (*conv_staged)(const Conv<A>&);
  void (*wgrad)(const Wgrad<A>&);
  void (*wgrad_staged)(const Wgrad<A>&);
  void (*store_nhwc)(const Store<A>&);
  void (*store_nchw)(const Store<A>&);
  void (*gemm)(const Gemm<A>&);
  void (*finish)(const Finish<A>&);
  void (*add)(const A* from, A* to, ptrdiff_t count);
  void (*clamp)(A* p, ptrdiff_t count, A low, A high);
  void (*relu_with_gradient)(A* v, A* dv, ptrdiff_t count);
  void (*residual_row)(const ResidualRow<A>&);
  void (*residual_row_grad)(const ResidualRowGrad<A>&);
  void (*unpool_row)(const Unpool<A>&);
};

struct Isa {
  const char* name;
  Kernels<float> float32, float16, bfloat16;
  Kernels<double> float64;
};

// One definition per instruction set, each in a compilation of kernels.cpp with its own flags.
namespace scalar {
extern const Isa isa;
}
namespace avx2 {
extern const Isa isa;
}
namespace avx512 {
extern const Isa isa;
}
namespace avx512_bf16 {
extern const Isa isa;
}

}  // namespace xsep::cpu
