// One task of a problem: its chunk of every image of its group, slab by slab. The class logits of a slab are read once,
// each kind of drawings adds its loss and its share of their gradient, and that is written once.
#pragma once

#include "class_field.h"
#include "one_matrix.h"
#include "pixel_grid.h"
#include "strided_grid.h"
#include "trusted.h"

namespace coarse {
namespace {

template <class R>
class Kind {
 public:
  void init(const Problem<R>& problem, const Plan<R>& plan, int index, Arena& arena) {
    problem_ = &problem;
    kind_ = &problem.kinds[index];
    form_ = form_of(problem, plan, index);
    layers_ = arena.take<LabelRun<R>>(kind_->layers);
    // two vectors more: tiles of the pixel grid are padded
    slots_ = static_cast<int64_t>(plan.vectors + 2) * kLanes<R>;
    label_ = arena.take<int32_t>(kind_->layers * slots_);
    valid_ = arena.take<R>(kind_->layers * slots_);
    weight_ = arena.take<R>(kind_->layers * slots_);
    switch (form_) {
      case Form::trusted: trusted_.init(problem, *kind_, arena); break;
      case Form::one_matrix: matrix_.init(problem, plan, index, arena); break;
      case Form::strided: strided_.init(problem, plan, index, arena); break;
      case Form::two_classes: two_.init(problem, *kind_, arena); break;
      case Form::pixels: pixels_.init(problem, *kind_, arena); break;
    }
    sum_ = plan.kinds[index].sum;
  }

  // With the workspace in place.
  void begin(int64_t task, int64_t group, int64_t slice) {
    const int64_t c = problem_->classes;
    // of a field at the pixels, which all images share
    R* const sum = sum_ == nullptr || form_ == Form::strided ? nullptr : sum_ + group * c * c * problem_->pixels();
    sums_ = {kind_->sums + 2 * task,
             kind_->transition_gradient == nullptr ? nullptr : kind_->transition_gradient + slice * c * c};
    for (int64_t l = 0; l < kind_->layers; ++l) {
      layers_[l] = {label_ + l * slots_, valid_ + l * slots_, weight_ + l * slots_, false, false, -1};
      memset(layers_[l].label, 0, sizeof(int32_t) * static_cast<size_t>(slots_));
      memset(layers_[l].valid, 0, sizeof(R) * static_cast<size_t>(slots_));
      memset(layers_[l].weight, 0, sizeof(R) * static_cast<size_t>(slots_));
    }
    if (form_ == Form::trusted) trusted_.begin();
    if (form_ == Form::one_matrix) matrix_.begin();
    if (form_ == Form::two_classes) two_.begin(sum);
    if (form_ == Form::pixels) pixels_.begin(sum);
  }

  void start(int64_t image, int64_t group, int64_t chunk, int64_t z, bool first) {
    if (form_ == Form::strided) strided_.start(image, group, chunk, z, first);
    if (form_ == Form::one_matrix) matrix_.start(image, group, chunk);
  }
  void enter(const Band& band) {
    if (form_ == Form::strided) strided_.enter(band);
  }
  void enter_strip(int64_t x0, int64_t x1) {
    if (form_ == Form::strided) strided_.enter_strip(x0, x1);
  }
  void leave_strip() {
    if (form_ == Form::strided) strided_.leave_strip();
  }
  void finish_slice() {
    if (form_ == Form::strided) strided_.finish();
  }
  void finish() {
    if (form_ == Form::one_matrix) matrix_.finish();
    if (form_ == Form::two_classes) two_.finish();
    if (form_ == Form::pixels) pixels_.finish();
  }

  // Labels of a slab. True where one is out of range.
  bool read(const Slab& slab) {
    bool bad = false;
    for (int64_t l = 0; l < kind_->layers; ++l) {
      layers_[l].any_valid = false;
      layers_[l].all_valid = true;
      const int64_t map = (slab.image * kind_->layers + l) * problem_->pixels(), lanes = slab.per_row * kLanes<R>;
      for (int r = 0; r < slab.rows; ++r) {
        const int64_t row = (slab.z * problem_->height + slab.y0 + r) * problem_->width;
        bad = layers_[l].read(*problem_, *kind_, map + row + slab.x0, slab.x1 - slab.x0, lanes, r * lanes) || bad;
      }
      if (form_ == Form::trusted || form_ == Form::one_matrix || form_ == Form::strided)
        layers_[l].find_common(slab.rows * lanes);
    }
    return bad;
  }

  const LabelRun<R>* layers() const { return layers_; }
  int64_t layer_count() const { return kind_->layers; }

  void run(ClassField<R>& field, const Slab& slab) {
    switch (form_) {
      case Form::trusted: trusted_.run(field, slab, layers_, sums_); break;
      case Form::one_matrix: matrix_.run(field, slab, layers_, sums_); break;
      case Form::strided: strided_.run(field, slab, layers_, sums_); break;
      case Form::two_classes: two_.run(field, slab, layers_, sums_); break;
      case Form::pixels: pixels_.run(field, slab, layers_, sums_); break;
    }
  }

 private:
  const Problem<R>* problem_ = nullptr;
  const Drawings<R>* kind_ = nullptr;
  Form form_ = Form::trusted;
  LabelRun<R>* layers_ = nullptr;
  int32_t* label_ = nullptr;  // of all layers, one after the other
  R *valid_ = nullptr, *weight_ = nullptr;
  int64_t slots_ = 0;
  R* sum_ = nullptr;
  Sums sums_{};
  Trusted<R> trusted_;
  OneMatrix<R> matrix_;
  StridedGrid<R> strided_;
  PixelGrid<R, 2> two_;  // two classes are common, and cheap enough for the loops over classes to show
  PixelGrid<R, 0> pixels_;
};

template <class R>
class Task {
  static constexpr int N = kLanes<R>;

 public:
  Task(const Problem<R>& problem, const Plan<R>& plan, void* workspace)
      : problem_(problem), plan_(plan), arena_(workspace) {
    field_.init(problem, plan, arena_);
    kinds_ = arena_.take<Kind<R>>(problem.kind_count);
    for (int k = 0; k < problem.kind_count; ++k) {
      Kind<R> counted;
      Kind<R>& kind = kinds_ == nullptr ? counted : *new (kinds_ + k) Kind<R>();
      kind.init(problem, plan, k, arena_);
    }
  }

  int64_t workspace_bytes() const { return arena_.used(); }

  void run(int64_t task) {
    task_ = task;
    const int64_t group = task / plan_.chunk_count, chunk = task % plan_.chunk_count;
    const Chunk& part = plan_.chunks[chunk];
    const int64_t b0 = problem_.batch * group / plan_.groups, b1 = problem_.batch * (group + 1) / plan_.groups;
    for_each([&](Kind<R>& kind) { kind.begin(task, group, plan_.slice_of(task)); });
    for (int64_t image = b0; image < b1; ++image) {
      for (int64_t z = part.z0; z < part.z1; ++z) {
        field_.start(image, group, chunk, z, image == b0);
        for_each([&](Kind<R>& kind) { kind.start(image, group, chunk, z, image == b0); });
        for (int32_t b = part.begin; b < part.end; ++b) band(plan_.bands[b], image, z, part);
        field_.finish();
        for_each([](Kind<R>& kind) { kind.finish_slice(); });
      }
    }
    for_each([](Kind<R>& kind) { kind.finish(); });
  }

 private:
  template <class F>
  void for_each(const F& f) {
    for (int k = 0; k < problem_.kind_count; ++k) f(kinds_[k]);
  }

  void band(const Band& band, int64_t image, int64_t z, const Chunk& part) {
    field_.enter(band);
    for_each([&](Kind<R>& kind) { kind.enter(band); });
    const int64_t strip = static_cast<int64_t>(plan_.per_row) * N;
    for (int64_t x = part.x0; x < part.x1; x += strip) {
      const int64_t x1 = part.x1 - x < strip ? part.x1 : x + strip;
      for_each([&](Kind<R>& kind) { kind.enter_strip(x, x1); });
      for (int32_t k = band.begin; k < band.end; ++k) {
        const Segment& segment = plan_.segments[k];
        const int per_row = static_cast<int>((x1 - x + N - 1) / N);
        slab({image, z, segment.y0, x, x1, segment.rows, per_row, k, plan_.vectors});
      }
      for_each([](Kind<R>& kind) { kind.leave_strip(); });
    }
  }

  void slab(const Slab& slab) {
    if (problem_.label_map != nullptr) return field_.write_labels(slab);
    for_each([&](Kind<R>& kind) {
      if (kind.read(slab)) problem_.bad_label[task_] = 1;
    });
    bool all_drawn = true;
    if (!find_drawn(slab, &all_drawn) && problem_.posterior == nullptr) {
      field_.write_zeros(slab);
      for_each([&](Kind<R>& kind) { kind.run(field_, slab); });  // zeros of its own
      return;
    }
    field_.read(slab, all_drawn);
    for_each([&](Kind<R>& kind) { kind.run(field_, slab); });
    field_.write(slab);
  }

  // Where some layer of some kind has a label.
  bool find_drawn(const Slab& slab, bool* all) {
    const int64_t n = static_cast<int64_t>(slab.count()) * N;
    bool any = false, one = false;
    for (int k = 0; k < problem_.kind_count; ++k) {
      for (int64_t l = 0; l < kinds_[k].layer_count(); ++l) {
        any = any || kinds_[k].layers()[l].any_valid;
        one = one || kinds_[k].layers()[l].all_valid;
      }
    }
    *all = one && (slab.x1 - slab.x0) % N == 0;
    if ((*all || !any) && problem_.posterior == nullptr) return any;
    R* const drawn = field_.drawn;
    for (int64_t at = 0; at < n; at += N) store(drawn + at, broadcast<Vec<R>>(R(0)));
    for (int k = 0; k < problem_.kind_count; ++k) {
      for (int64_t l = 0; l < kinds_[k].layer_count(); ++l) {
        const R* const valid = kinds_[k].layers()[l].valid;
        for (int64_t at = 0; at < n; at += N) store(drawn + at, max_v(load(valid + at), load(drawn + at)));
      }
    }
    return any;
  }

  const Problem<R>& problem_;
  const Plan<R>& plan_;
  Arena arena_;
  ClassField<R> field_;
  Kind<R>* kinds_ = nullptr;
  int64_t task_ = 0;
};

template <class R>
int64_t task_workspace(const Problem<R>& problem, const Plan<R>& plan) {
  return Task<R>(problem, plan, nullptr).workspace_bytes();
}

template <class R>
void run_task(const Problem<R>& problem, const Plan<R>& plan, int64_t task, void* workspace) {
  Task<R>(problem, plan, workspace).run(task);
}

}  // namespace
}  // namespace coarse
