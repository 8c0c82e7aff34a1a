// SPDX-License-Identifier: MIT
//
// A rectangular part of a tensor, such as the shard of a process. Stochastic rounding depends on
// the index of an element in the whole tensor, so that no division among processes changes a bit.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "step/passes.hpp"

namespace fusedadam {

class Part final : public Pieces {
 public:
  // A part of this shape, in C order, which begins at `offset` of the whole. All have the same
  // number of dimensions.
  Part(std::span<const std::int64_t> whole, std::span<const std::int64_t> shape,
       std::span<const std::int64_t> offset);
  Part(const Part&) = delete;
  Part& operator=(const Part&) = delete;

  // Sets the indices of a tensor's elements. The tensor must not outlive this object.
  void attach_to(TensorRef& tensor) const noexcept;

  std::int64_t gradient_size(const TensorRef& tensor) const noexcept override;
  Stream gradient_tile(const TensorRef& tensor, std::int64_t first, std::int64_t n,
                       void* staging) const override;
  void for_each(const TensorRef& tensor, std::int64_t first, std::int64_t end, PieceBody body,
                void* context) const override;

 private:
  std::int64_t run_ = 1;              // elements that follow each other in the whole tensor, too
  std::vector<std::int64_t> starts_;  // index in the whole tensor of each run
};

}  // namespace fusedadam
