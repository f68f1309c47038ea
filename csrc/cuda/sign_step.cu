#include <type_traits>

#include "checks/sign_step.h"
#include "cuda/launch.h"
#include "cuda/sign_step.cuh"
#include "layout.h"
#include "with_type.h"

namespace alignfast {
namespace {

template <class T>
SignStepTensor<T> tensor_of(const Tensor& tensor, const std::array<int64_t, 3>& order) {
  const ImageLayout layout = layout_of(tensor, order);
  if constexpr (std::is_const_v<T>) {
    return {static_cast<T*>(tensor.const_data_ptr()), layout, tensor.stride(0)};
  } else {
    return {static_cast<T*>(tensor.mutable_data_ptr()), layout, tensor.stride(0)};
  }
}

// Whether packs of an image can be read in one piece from all tensors.
template <class T>
bool in_packs(const SignStepBatch<T>& batch) {
  const auto fits = [&](const auto& tensor) {
    constexpr int64_t PER_WORD = 16 / static_cast<int64_t>(sizeof(T));
    return tensor.layout.dense && aligned(tensor.data) && tensor.image_stride % PER_WORD == 0;
  };
  return batch.elements % PACK<Wide<T>> == 0 && fits(batch.adv) && fits(batch.images) && fits(batch.grad) &&
         fits(batch.momentum);
}

template <class T, bool DENSE>
void linf(const Launcher& launch, const SignStepBatch<T>& batch, const SignStepConfig& config, int64_t blocks,
          const Tensor& images) {
  if (batch.momentum.data == nullptr) {
    return launch("sign_step_linf", sign_step_linf<T, DENSE, false>, blocks, SIGN_STEP_THREADS, batch, config,
                  static_cast<const double*>(nullptr));
  }
  const Tensor l1 = empty_on(images, {blocks}, ScalarType::Double);
  double* sums = l1.mutable_data_ptr<double>();
  launch("sign_step_l1", sign_step_l1<T, DENSE>, blocks, SIGN_STEP_THREADS, batch, sums);
  launch("sign_step_linf", sign_step_linf<T, DENSE, true>, blocks, SIGN_STEP_THREADS, batch, config, sums);
}

template <class T, bool DENSE>
void l2(const Launcher& launch, const SignStepBatch<T>& batch, const SignStepConfig& config, int64_t blocks,
        const Tensor& images) {
  const Tensor partials = empty_on(images, {4, blocks}, ScalarType::Double);
  double* l1 = partials.mutable_data_ptr<double>();
  double *largest = l1 + blocks, *squares = largest + blocks, *distances = squares + blocks;
  if (batch.momentum.data == nullptr) {
    l1 = nullptr;
  } else {
    launch("sign_step_l1", sign_step_l1<T, DENSE>, blocks, SIGN_STEP_THREADS, batch, l1);
  }
  launch("sign_step_l2_direction", sign_step_l2_direction<T, DENSE>, blocks, SIGN_STEP_THREADS, batch, config, l1,
         largest);
  launch("sign_step_l2_length", sign_step_l2_length<T, DENSE>, blocks, SIGN_STEP_THREADS, batch, largest, squares);
  launch("sign_step_l2_move", sign_step_l2_move<T, DENSE>, blocks, SIGN_STEP_THREADS, batch, config, largest, squares,
         distances);
  launch("sign_step_l2_project", sign_step_l2_project<T, DENSE>, blocks, SIGN_STEP_THREADS, batch, config, distances);
}

template <class T>
void step(const Tensor& adv, const Tensor& images, const Tensor& grad, const std::optional<Tensor>& momentum,
          const SignStepConfig& config, bool along_axes) {
  const auto order = memory_order(adv);
  SignStepBatch<T> batch{tensor_of<T>(adv, order),        tensor_of<const T>(images, order),
                         tensor_of<const T>(grad, order), tensor_of<T>(momentum ? *momentum : adv, order),
                         images.numel() / images.size(0), 0};
  const bool dense = in_packs(batch);
  if (!momentum) batch.momentum.data = nullptr;
  const int64_t stretches = in_groups_of(SIGN_STEP_STRETCH<T>, batch.elements);
  AF_CHECK(stretches <= MAX_BLOCKS, "images: got ", batch.elements, " elements an image; allowed is up to ",
           MAX_BLOCKS * SIGN_STEP_STRETCH<T>);
  batch.stretches = static_cast<unsigned>(stretches);
  const int64_t blocks = stretches * images.size(0);
  const Launcher launch(images);
  if (along_axes) {
    (dense ? linf<T, true> : linf<T, false>)(launch, batch, config, blocks, images);
  } else {
    (dense ? l2<T, true> : l2<T, false>)(launch, batch, config, blocks, images);
  }
}

void sign_step(Tensor adv, Tensor images, Tensor grad, std::optional<Tensor> momentum, double alpha, double eps,
               double decay, double low, double high, std::string norm) {
  const Dtype dtype = check_sign_step(adv, images, grad, momentum, alpha, eps, decay, low, high, norm);
  if (images.numel() == 0) return;
  with_type(dtype, [&](auto type) {
    step<decltype(type)>(adv, images, grad, momentum, {alpha, eps, decay, low, high}, norm == "linf");
  });
}

}  // namespace
}  // namespace alignfast

STABLE_TORCH_LIBRARY_IMPL(alignfast, AF_GPU_KEY, m) { m.impl("sign_step", TORCH_BOX(&alignfast::sign_step)); }
