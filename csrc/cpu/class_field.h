// The class logits: read once for all kinds of drawings, their gradient written once.
//
//   read     s[j] of a slab, interpolated where the logits have a grid of their own; p = softmax(s)
//   kinds    each adds its share: mass += w, own[j] -= w r[j]          (w the pixel's weight, r the kind's posterior)
//   write    mass p[j] + own[j] = sum over kinds of w (p[j] - r[j]); to the pixel, or summed onto the grid
//
// Nothing here has the size of C planes of pixels. The posterior of several kinds is p[j] prod q[j], normalised: each
// kind adds log q[j] to joint[j] = log p[j].
#pragma once

#include <algorithm>

#include "columns.h"
#include "common.h"
#include "gradient_rows.h"

namespace coarse {
namespace {

// A gradient of so many bytes is out of the cache before somebody reads it. Planes of images whose sides are powers of
// two share few sets of a cache, so that a line that it must read before it is written is often gone by then.
constexpr int64_t kStreamedBytes = int64_t{4} << 20;

// Where slabs are one vector wide, the logits of so many side by side are read together, as far as their bytes leave
// room in the second-level cache: the other lines of what the processor fetches along with a line, and on sides that
// are powers of two its neighbours in the set, are gone when the next slab asks for them.
constexpr int64_t kMostAhead = 4;

template <class R>
class ClassField {
  using V = Vec<R>;
  using I = typename Lanes<V>::Int;
  static constexpr int N = kLanes<R>;

 public:
  V* s;      // logits, less their maximum
  V* p;      // of the true class
  V* own;    // gradient, but for mass * p
  V* joint;  // with a posterior: log p + the sum of log q
  V* mass;
  V* log_sum;  // log sum_j exp(s[j]); for trusted kinds and posteriors
  R* drawn;    // 1 where some layer of some kind has a label

  void init(const Problem<R>& problem, const Plan<R>& plan, Arena& arena) {
    problem_ = &problem;
    plan_ = &plan.seg;
    segments_ = plan.segments;
    const int64_t c = problem.classes, n = plan.vectors, band = c * n * plan.most_segments;
    if (plan.seg.on_pixels && plan.per_row == 1)
      ahead_ =
          std::clamp<int64_t>(second_level_cache() * 3 / 32 / (band * static_cast<int64_t>(sizeof(V))), 1, kMostAhead);
    s = blocks_ = arena.take<V>(ahead_ > 1 ? ahead_ * band : c * n);
    p = arena.take<V>(c * n);
    own = arena.take<V>(c * n);
    joint = problem.posterior != nullptr ? arena.take<V>(c * n) : nullptr;
    mass = arena.take<V>(n);
    log_sum = arena.take<V>(n);
    drawn = arena.take<R>(n * N);
    want_log_sum_ = problem.posterior != nullptr;
    for (int k = 0; k < problem.kind_count; ++k)
      want_log_sum_ = want_log_sum_ || problem.kinds[k].field.data == nullptr;
    lines_ = arena.take<V>(plan.seg.rows);
    streams_ = problem.seg.gradient != nullptr && plan_->on_pixels && sizeof(V) == 64 &&
               problem.seg.storage == own_storage_ && problem.width % N == 0 &&
               reinterpret_cast<uintptr_t>(problem.seg.gradient) % sizeof(V) == 0 &&
               problem.batch * c * problem.pixels() * static_cast<int64_t>(sizeof(R)) >= kStreamedBytes;
    columns_ = arena.take<Columns<R>>(plan.per_row);
    if (!gathers()) return;
    rows_.init(problem.seg, plan.seg, c, 1, plan.chunk_count, arena);
    scattered_ = arena.take<V>(rows_.vectors());
  }

  bool gathers() const { return problem_->seg.gradient != nullptr && !plan_->on_pixels; }

  void start(int64_t image, int64_t group, int64_t chunk, int64_t z, bool first) {
    if (gathers()) rows_.start(image, group, chunk, z, first);
  }
  void enter(const Band& band) {
    band_ = band;
    read_end_ = read_begin_ = -1;
    if (gathers()) rows_.need(plan_->y.i0[band.y0], plan_->y.next(band.y1 - 1));
  }
  void finish() {
    if (gathers()) rows_.finish();
    if (streams_) stream_fence();
  }

  // s, in the slab.
  void logits(const Slab& slab) {
    const int c = problem_->classes;
    if (plan_->on_pixels) {
      if (ahead_ > 1) return find_block(slab);
      const int64_t pixels = problem_->pixels();
      for_each_vector(*problem_, slab, [&](const Place& place) {
        int64_t offset = slab.image * c * pixels + place.at;
        for (int j = 0; j < c; ++j, offset += pixels) s[j * slab.pitch + place.v] = load_lanes(offset, place.lanes);
      });
      return;
    }
    const Axis<R>& y = plan_->y;
    const int64_t first = y.i0[slab.y0], last = y.next(slab.y0 + slab.rows - 1);
    find_columns(slab);
    for (int m = 0; m < slab.per_row; ++m) {
      for (int j = 0; j < c; ++j) {
        for (int64_t g = first; g <= last; ++g) lines_[g - first] = line(slab, columns_[m], j, g);
        for (int r = 0; r < slab.rows; ++r) {
          const int64_t upper = y.i0[slab.y0 + r], lower = y.after(upper);
          V x = lines_[upper - first];
          if (y.interpolated) {
            const R lambda = y.lambda[slab.y0 + r];
            x = (R(1) - lambda) * x + lambda * lines_[lower - first];
          }
          s[j * slab.pitch + r * slab.per_row + m] = x;
        }
      }
    }
  }

  // s and p. Logits of pixels that nobody drew on may be anything, NaN too: they count as 0, but for the posterior.
  void read(const Slab& slab, bool all_drawn) {
    logits(slab);
    problem_->classes == 2 ? softmax<2>(slab, all_drawn) : softmax<0>(slab, all_drawn);
  }

  void write(const Slab& slab) {
    if (problem_->posterior != nullptr) return write_posterior(slab);
    if (problem_->seg.gradient == nullptr) return;
    problem_->classes == 2 ? add_mass<2>(slab) : add_mass<0>(slab);
    if (!plan_->on_pixels) return scatter(slab);
    const int64_t pixels = problem_->pixels();
    if (streams_ && slab.x1 - slab.x0 == slab.per_row * N) {
      for (int j = 0; j < problem_->classes; ++j) {
        R* const plane = static_cast<R*>(problem_->seg.gradient) + first_pixel(slab) + j * pixels;
        const V* const from = own + j * slab.pitch;
        for (int r = 0; r < slab.rows; ++r)
          for (int m = 0; m < slab.per_row; ++m)
            stream<R>(plane + r * problem_->width + m * N, from[r * slab.per_row + m]);
      }
      return;
    }
    for_each_vector(*problem_, slab, [&](const Place& place) {
      int64_t offset = slab.image * problem_->classes * pixels + place.at;
      for (int j = 0; j < problem_->classes; ++j, offset += pixels)
        store_lanes(problem_->seg.gradient, offset, place.lanes, own[j * slab.pitch + place.v]);
    });
  }

  // Two classes are common, and cheap enough for the loops over classes to show.
  template <int kClasses>
  void softmax(const Slab& slab, bool all_drawn) {
    const int c = kClasses > 0 ? kClasses : problem_->classes, pitch = slab.pitch, count = slab.count();
    const bool masked = !all_drawn && problem_->posterior == nullptr;
    const V zero = broadcast<V>(R(0));
    for (int v = 0; v < count; ++v) {
      V* const sv = s + v;
      V* const pv = p + v;
      V* const ov = own + v;
      if (masked) {
        const V known = load(drawn + v * N);
        for (int j = 0; j < c; ++j) sv[j * pitch] = select(known != zero, sv[j * pitch], zero);
      }
      V top = sv[0];
      for (int j = 1; j < c; ++j) top = max_v(sv[j * pitch], top);
      V sum = zero;
      in_blocks<kBlock>(c, [&](auto block, int j) {
        V e[block.value];
        for (int k = 0; k < block.value; ++k) e[k] = sv[(j + k) * pitch] -= top;
        exp_each<block.value>(e);
        for (int k = 0; k < block.value; ++k) {
          pv[(j + k) * pitch] = e[k];
          sum += e[k];
        }
      });
      const V inv = R(1) / sum;
      for (int j = 0; j < c; ++j) {
        pv[j * pitch] *= inv;
        ov[j * pitch] = zero;
      }
      mass[v] = zero;
      if (want_log_sum_) log_sum[v] = log_v(sum);
      if (joint == nullptr) continue;
      for (int j = 0; j < c; ++j) joint[j * pitch + v] = sv[j * pitch] - log_sum[v];
    }
  }

  // own += mass p; p may be NaN where nothing counts.
  template <int kClasses>
  void add_mass(const Slab& slab) {
    const int c = kClasses > 0 ? kClasses : problem_->classes, pitch = slab.pitch, count = slab.count();
    const V zero = broadcast<V>(R(0));
    for (int j = 0; j < c; ++j) {
      const V* const pj = p + j * pitch;
      V* const oj = own + j * pitch;
      for (int v = 0; v < count; ++v) oj[v] += select(mass[v] == zero, zero, mass[v] * pj[v]);
    }
  }

  // Nobody drew here.
  void write_zeros(const Slab& slab) {
    if (problem_->seg.gradient == nullptr || !plan_->on_pixels) return;
    for_each_vector(*problem_, slab, [&](const Place& place) {
      const int64_t pixels = problem_->pixels();
      int64_t offset = slab.image * problem_->classes * pixels + place.at;
      for (int j = 0; j < problem_->classes; ++j, offset += pixels)
        store_lanes(problem_->seg.gradient, offset, place.lanes, broadcast<V>(R(0)));
    });
  }

  // The most probable class: the first of equals, and NaN before all, as torch.argmax has it.
  void write_labels(const Slab& slab) {
    logits(slab);
    for_each_vector(*problem_, slab, [&](const Place& place) {
      const int v = place.v;
      V best = s[v], label = broadcast<V>(R(0));
      for (int j = 1; j < problem_->classes; ++j) {
        const V x = s[j * slab.pitch + v];
        const I better = (x > best) | ((x != x) & (best == best));
        best = select(better, x, best);
        label = select(better, broadcast<V>(static_cast<R>(j)), label);
      }
      const int64_t at = slab.image * problem_->pixels() + place.at;
      for (int64_t k = 0; k < place.lanes; ++k) {
        if (problem_->label_map_type == LabelType::u8) {
          static_cast<uint8_t*>(problem_->label_map)[at + k] = static_cast<uint8_t>(label[k]);
        } else {
          static_cast<int64_t*>(problem_->label_map)[at + k] = static_cast<int64_t>(label[k]);
        }
      }
    });
  }

 private:
  static constexpr Storage own_storage_ = sizeof(R) == 4 ? Storage::f32 : Storage::f64;

  int64_t first_pixel(const Slab& slab) const {  // of class 0
    return slab.image * problem_->classes * problem_->pixels() +
           (slab.z * problem_->height + slab.y0) * problem_->width + slab.x0;
  }

  // s of a slab among those that were read together: of each segment of the band, of each strip.
  void find_block(const Slab& slab) {
    if (slab.x0 < read_begin_ || slab.x0 >= read_end_) read_ahead(slab);
    const int64_t strip = (slab.x0 - read_begin_) / N;
    s = blocks_ + ((slab.segment - band_.begin) * ahead_ + strip) * problem_->classes * slab.pitch;
  }

  void read_ahead(const Slab& slab) {
    const int64_t c = problem_->classes, width = problem_->width, block = c * slab.pitch;
    read_begin_ = slab.x0;
    read_end_ = std::min(read_begin_ + ahead_ * N, width);
    for (int32_t k = band_.begin; k < band_.end; ++k) {
      const Segment& segment = segments_[k];
      V* const blocks = blocks_ + (k - band_.begin) * ahead_ * block;
      for (int64_t j = 0; j < c; ++j) {
        const int64_t plane = (slab.image * c + j) * problem_->pixels();
        for (int r = 0; r < segment.rows; ++r) {
          const int64_t row = plane + (slab.z * problem_->height + segment.y0 + r) * width;
          V* to = blocks + j * slab.pitch + r;
          for (int64_t x = read_begin_; x < read_end_; x += N, to += block)
            *to = load_lanes(row + x, std::min<int64_t>(width - x, N));
        }
      }
    }
  }

  V load_lanes(int64_t offset, int64_t lanes) const {
    if (problem_->seg.storage == own_storage_ && lanes == N)
      return load(static_cast<const R*>(problem_->seg.data) + offset);
    R run[N] = {};
    load_run(problem_->seg.data, problem_->seg.storage, offset, lanes, run);
    return load(run);
  }

  void store_lanes(void* to, int64_t offset, int64_t lanes, V x) const {
    if (problem_->seg.storage == own_storage_ && lanes == N) return store(static_cast<R*>(to) + offset, x);
    R run[N];
    store(run, x);
    store_run(to, problem_->seg.storage, offset, lanes, run);
  }

  // --- a grid of its own ---------------------------------------------------------------------------------------------

  // Of the vectors of a row, once for the slabs below one another.
  void find_columns(const Slab& slab) {
    if (slab.x0 == begin_ && slab.x1 == end_) return;
    begin_ = slab.x0;
    end_ = slab.x1;
    for (int m = 0; m < slab.per_row; ++m) {
      const int64_t begin = slab.x0 + static_cast<int64_t>(m) * N;
      columns_[m] = Columns<R>{};
      columns_[m].find(plan_->x, begin, slab.x1 - begin < N ? slab.x1 - begin : N);
    }
  }

  // N points of a row of the grid from `first` on.
  V points(int64_t row, int64_t first) const {
    const int64_t offset = row + first, left = plan_->x.grid - first;  // of the row
    const Field& seg = problem_->seg;
    if (seg.storage == own_storage_ && offset + N <= seg.images * problem_->classes * seg.points())
      return load(static_cast<const R*>(seg.data) + offset);
    R run[N] = {};
    if (left > 0) load_run(seg.data, seg.storage, offset, left < N ? left : N, run);
    return load(run);
  }

  V along_x(const Columns<R>& columns, int64_t row) const {
    const V low = points(row, columns.node);
    return columns.nodes <= N ? columns.read(low) : columns.read(low, points(row, columns.node + N));
  }

  V line(const Slab& slab, const Columns<R>& columns, int j, int64_t g) const {
    const Axis<R>& z = plan_->z;
    const auto row = [&](int64_t slice) {
      return (slab.image * problem_->classes + j) * problem_->seg.points() +
             (slice * plan_->y.grid + g) * plan_->x.grid;
    };
    const V a = along_x(columns, row(z.i0[slab.z]));
    if (!z.interpolated) return a;
    const R lambda = z.lambda[slab.z];
    return (R(1) - lambda) * a + lambda * along_x(columns, row(z.next(slab.z)));
  }

  // own, summed onto the rows of the grid: over the rows of the slab first, then from lanes to points.
  void scatter(const Slab& slab) {
    const Axis<R>& y = plan_->y;
    const int c = problem_->classes;
    const int64_t first = y.i0[slab.y0], last = y.next(slab.y0 + slab.rows - 1);
    find_columns(slab);
    int64_t begin = rows_.vectors(), end = 0;
    for (int64_t g = first; g <= last; ++g) {
      const int64_t own = rows_.slot(g);
      begin = own < begin ? own : begin;
      end = own + c > end ? own + c : end;
    }
    for (int m = 0; m < slab.per_row; ++m) {
      for (int64_t k = begin; k < end; ++k) scattered_[k] = broadcast<V>(R(0));
      for (int r = 0; r < slab.rows; ++r) {
        const int64_t upper = y.i0[slab.y0 + r];
        const R lambda = y.interpolated ? y.lambda[slab.y0 + r] : R(0);
        V *const above = scattered_ + rows_.slot(upper), *const below = scattered_ + rows_.slot(y.after(upper));
        for (int j = 0; j < c; ++j) {
          const V x = own[j * slab.pitch + r * slab.per_row + m], share = lambda * x;
          above[j] += y.interpolated ? x - share : x;
          if (y.interpolated) below[j] += share;
        }
      }
      rows_.gather(columns_[m], scattered_, begin, end);
    }
  }

  void write_posterior(const Slab& slab) {
    const int c = problem_->classes, pitch = slab.pitch;
    const V zero = broadcast<V>(R(0)), inf = broadcast<V>(std::numeric_limits<R>::infinity());
    for_each_vector(*problem_, slab, [&](const Place& place) {
      const int v = place.v;
      V top = joint[v];
      for (int j = 1; j < c; ++j) top = max_v(joint[j * pitch + v], top);
      const V shift = select(top == -inf, zero, top);
      V sum = zero;
      for (int j = 0; j < c; ++j) {
        joint[j * pitch + v] = exp_v(joint[j * pitch + v] - shift);
        sum += joint[j * pitch + v];
      }
      const V known = load(drawn + v * N);
      for (int j = 0; j < c; ++j) {
        // labels that no class explains: p; so where there is none
        const V r = select(sum == zero, p[j * pitch + v], joint[j * pitch + v] / sum);
        const int64_t offset = (slab.image * c + j) * problem_->pixels() + place.at;
        store_lanes(problem_->posterior, offset, place.lanes, select(known != zero, r, p[j * pitch + v]));
      }
    });
  }

  const Problem<R>* problem_ = nullptr;
  const FieldPlan<R>* plan_ = nullptr;
  bool want_log_sum_ = false;
  bool streams_ = false;                     // the gradient, past the caches
  int64_t ahead_ = 1;                        // strips that are read together
  int64_t read_begin_ = -1, read_end_ = -1;  // pixels that they are
  V* blocks_;
  Band band_{};
  const Segment* segments_ = nullptr;
  GradientRows<R> rows_;
  int64_t begin_ = -1, end_ = -1;  // pixels that columns_ are of
  Columns<R>* columns_;            // of each vector of a row
  V *lines_, *scattered_;
};

}  // namespace
}  // namespace coarse
