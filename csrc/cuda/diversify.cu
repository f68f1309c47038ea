#include <limits>

#include "checks/diversify.h"
#include "cuda/diversify.cuh"
#include "cuda/launch.h"

namespace alignfast {
namespace {

Planes planes_of(const Tensor& images) {
  return {floating_dtype("images", images.scalar_type()),
          images.const_data_ptr(),
          {images.stride(0), images.stride(1), images.stride(2), images.stride(3)}};
}

// [K, N], or [C] as one row.
Numbers numbers_of(const std::optional<Tensor>& numbers) {
  if (!numbers) return {Dtype::float32, nullptr, {0, 0}};
  return {floating_dtype("numbers", numbers->scalar_type()),
          numbers->const_data_ptr(),
          {numbers->dim() == 2 ? numbers->stride(0) : 0, numbers->stride(-1)}};
}

Counts counts_of(const Tensor& counts) {
  return {counts.const_data_ptr<int64_t>(), {counts.stride(0), counts.stride(1)}};
}

Indices indices_of(const Tensor& indices) { return {indices.const_data_ptr<int64_t>(), indices.stride(0)}; }

// The tensor as it is written, in runs of `run` pixels.
DiversifyBatch batch_of(const Tensor& out, bool interleaved, int64_t run) {
  const int64_t channels = out.size(1), pixels = out.size(2) * out.size(3);
  AF_CHECK(channels * pixels <= std::numeric_limits<int>::max() / 2, "images: got shape ", shape_text(out),
           "; allowed is up to ", std::numeric_limits<int>::max() / 2, " elements an image");
  return {floating_dtype("dtype", out.scalar_type()),
          out.mutable_data_ptr(),
          interleaved,
          static_cast<int>(channels),
          static_cast<int>(out.size(3)),
          static_cast<int>(pixels),
          static_cast<unsigned>(in_groups_of(run, pixels)),
          static_cast<unsigned>(in_groups_of(STAGED_CHANNELS, channels))};
}

int64_t blocks_of(const DiversifyBatch& batch, int64_t rows) { return rows * batch.runs * batch.groups; }

struct Geometry {
  ResizePads pads;
  int64_t rows, images;
};

Geometry geometry_of(const Tensor& resized, const Tensor& top, const Tensor& left, int64_t padded, int64_t size) {
  return {{counts_of(resized), counts_of(top), counts_of(left), padded, size}, resized.numel(), resized.size(1)};
}

// Memory for a table of integers and numbers, as many as given for every position of a row or column.
struct TableMemory {
  Tensor integers, numbers;

  TableMemory(const Tensor& images, const Geometry& geometry, int64_t per_integer, int64_t per_number, bool float64)
      : integers(empty_on(images, {geometry.rows * 2 * geometry.pads.size * per_integer}, ScalarType::Int)),
        numbers(empty_on(images, {geometry.rows * 2 * geometry.pads.size * per_number},
                         float64 ? ScalarType::Double : ScalarType::Float)) {}

  template <class Table>
  Table as() const {
    return {integers.mutable_data_ptr<int>(), static_cast<decltype(Table::weight)>(numbers.mutable_data_ptr())};
  }
};

DiversifyNoise noise_of(double radius, const std::vector<int64_t>& key, const std::optional<Tensor>& images,
                        const std::optional<Tensor>& copies, const std::optional<Tensor>& step) {
  if (!images) return {};
  return {indices_of(*images),
          indices_of(*copies),
          {static_cast<uint64_t>(key[1]) << 32 | static_cast<uint64_t>(key[0]), key[2],
           step ? step->const_data_ptr<int64_t>() : nullptr, static_cast<uint32_t>(key[3])},
          static_cast<float>(-radius),
          static_cast<float>(2 * radius)};
}

DiversifyMixing mixing_of(const std::optional<Tensor>& pool, const std::optional<Tensor>& partner,
                          const std::optional<Tensor>& weight) {
  if (!pool) return {};
  return {planes_of(*pool), pool->size(0), counts_of(*partner), numbers_of(weight)};
}

template <class V>
void build_plain(const Launcher& launch, const DiversifyPlain<V>& plain, int64_t rows) {
  launch("diversify_plain", diversify_plain<V>, blocks_of(plain.batch, rows), DIVERSIFY_THREADS, plain);
}

template <class V>
void build_resized(const Launcher& launch, DiversifyResized<V> resized, const Geometry& geometry,
                   const Tensor& images) {
  const TableMemory memory(images, geometry, MAX_TAPS, MAX_TAPS, sizeof(V) == sizeof(double));
  resized.table = memory.as<TapTable<V>>();
  launch("diversify_taps", diversify_taps<V>, 2 * geometry.rows, TAPS_THREADS, geometry.pads, geometry.images,
         resized.table);
  launch("diversify_resized", diversify_resized<V>, blocks_of(resized.batch, geometry.rows), DIVERSIFY_THREADS,
         resized);
}

Tensor diversify(Tensor images, int64_t copies, double noise_radius, std::vector<int64_t> noise_key,
                 std::optional<Tensor> noise_images, std::optional<Tensor> noise_copies, std::optional<Tensor> pool,
                 std::optional<Tensor> partner, std::optional<Tensor> weight, std::optional<Tensor> scale,
                 std::optional<Tensor> resized, std::optional<Tensor> top, std::optional<Tensor> left, int64_t padded,
                 std::optional<Tensor> mean, std::optional<Tensor> std, ScalarType dtype, bool channels_last,
                 std::optional<Tensor> noise_step) {
  check_diversify(images, copies, noise_radius, noise_key, noise_images, noise_copies, pool, partner, weight, scale,
                  resized, top, left, padded, mean, std, dtype, noise_step);
  const Tensor out = diversify_result(images, copies, dtype, channels_last);
  if (out.numel() == 0) return out;
  const int64_t count = images.size(0), rows = copies * count;
  const Launcher launch(images);
  const auto build = [&](auto zero) {
    using V = decltype(zero);
    const Normalisation<V> normalisation{numbers_of(mean), numbers_of(std)};
    DiversifyPlain<V> plain{batch_of(out, channels_last, PLAIN_PIXELS),
                            planes_of(images),
                            count,
                            noise_of(noise_radius, noise_key, noise_images, noise_copies, noise_step),
                            mixing_of(pool, partner, weight),
                            numbers_of(scale),
                            normalisation};
    if (!resized) return build_plain(launch, plain, rows);

    // What is not in memory as it is resized is put there first.
    const bool made = noise_images || pool;
    Tensor source = images;
    if (made) {
      const ScalarType wide = sizeof(V) == sizeof(double) ? ScalarType::Double : ScalarType::Float;
      source = diversify_result(images, copies, wide, false);
      plain.batch = batch_of(source, false, PLAIN_PIXELS);
      plain.scale = numbers_of(std::nullopt);
      plain.normalisation = {numbers_of(std::nullopt), numbers_of(std::nullopt)};
      build_plain(launch, plain, rows);
    }
    build_resized<V>(launch,
                     {batch_of(out, channels_last, DIVERSIFY_THREADS),
                      planes_of(source),
                      made,
                      count,
                      {},
                      numbers_of(scale),
                      normalisation},
                     geometry_of(*resized, *top, *left, padded, images.size(2)), images);
  };
  images.scalar_type() == ScalarType::Double ? build(double()) : build(float());
  return out;
}

Tensor diversify_backward(Tensor grad, int64_t copies, std::optional<Tensor> scale, std::optional<Tensor> resized,
                          std::optional<Tensor> top, std::optional<Tensor> left, int64_t padded,
                          std::optional<Tensor> std, ScalarType dtype) {
  check_diversify_backward(grad, copies, scale, resized, top, left, padded, std, dtype);
  const int64_t count = grad.size(0) / copies;
  const Tensor out = empty_on(grad, {count, grad.size(1), grad.size(2), grad.size(3)}, dtype);
  if (out.numel() == 0) return out;
  const Launcher launch(grad);
  const auto sum = [&](auto zero) {
    using V = decltype(zero);
    DiversifyAdjoint<V> adjoint{batch_of(out, false, resized ? DIVERSIFY_THREADS : PLAIN_PIXELS),
                                planes_of(grad),
                                copies,
                                count,
                                numbers_of(scale),
                                numbers_of(std),
                                {}};
    const int64_t blocks = blocks_of(adjoint.batch, count);
    if (!resized) {
      return launch("diversify_adjoint_plain", diversify_adjoint_plain<V>, blocks, DIVERSIFY_THREADS, adjoint);
    }
    const Geometry geometry = geometry_of(*resized, *top, *left, padded, grad.size(2));
    const TableMemory memory(grad, geometry, 1, MAX_SOURCES, sizeof(V) == sizeof(double));
    adjoint.table = memory.as<SourceTable<V>>();
    launch("diversify_sources", diversify_sources<V>, 2 * geometry.rows, TAPS_THREADS, geometry.pads, geometry.images,
           adjoint.table);
    launch("diversify_adjoint_resized", diversify_adjoint_resized<V>, blocks, DIVERSIFY_THREADS, adjoint);
  };
  dtype == ScalarType::Double ? sum(double()) : sum(float());
  return out;
}

}  // namespace
}  // namespace alignfast

STABLE_TORCH_LIBRARY_IMPL(alignfast, AF_GPU_KEY, m) {
  m.impl("diversify", TORCH_BOX(&alignfast::diversify));
  m.impl("diversify_backward", TORCH_BOX(&alignfast::diversify_backward));
}
