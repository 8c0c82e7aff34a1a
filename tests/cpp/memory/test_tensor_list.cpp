// SPDX-License-Identifier: MIT
#include "memory/tensor_list.hpp"

#include <gtest/gtest.h>

#include <random>

namespace fusedadam {
namespace {

constexpr auto tile = static_cast<std::int64_t>(tile_size);
using Edge = TensorList::Edge;

std::vector<std::vector<TensorRef>> lists() {
  const auto f32 = [](std::int64_t size) { return TensorRef(Storage::f32, size); };
  const auto f64 = [](std::int64_t size) { return TensorRef(Storage::f64, size); };
  std::vector<std::vector<TensorRef>> all{
      {},
      {f32(0)},
      {f32(1)},
      {f64(tile)},
      {f32(tile + 1), f64(tile - 1)},
      {f32(0), f64(0), f32(10 * tile), f64(0)},
      {f32(100000), f64(100000), f32(1)},
      {f64(4097 * tile), f32(3), f32(9000 * tile + 5)},
      // Larger than any memory: nothing may overflow.
      {f32(INT64_MAX / 16), f64(INT64_MAX / 32), f32(1), f64(INT64_MAX / 32 - 7)},
  };
  all.emplace_back(1000, f32(1000));
  std::mt19937_64 random(1);
  for (int i = 0; i < 20; ++i) {
    std::vector<TensorRef>& list = all.emplace_back();
    for (std::uint64_t n = random() % 30; n > 0; --n) {
      const auto size = static_cast<std::int64_t>(random() >> (43 + random() % 21));
      list.push_back(random() % 2 == 0 ? f32(size) : f64(size));
    }
  }
  return all;
}

// The pieces of all parts, in order, cover every element of every tensor exactly once, in order.
// All parts have the same number of bytes, but for a tile of float64: a cut is up to one before its
// ideal place.
TEST(TensorList, PartsCoverEveryElementOnceAndAreOfEqualBytes) {
  for (const std::vector<TensorRef>& tensors : lists()) {
    const TensorList list(tensors);
    double total = 0;
    std::int64_t elements = 0;
    for (const TensorRef& t : tensors) {
      total += static_cast<double>(t.size) * item_size(t.param_storage());
      elements += t.size;
    }
    EXPECT_EQ(list.elements(), elements);
    for (const int parts : {1, 2, 3, 5, 7, 16, 61, 1000}) {
      for (const Edge edge : {Edge::tile, Edge::block}) {
        std::size_t at = 0;
        std::int64_t next = 0;
        const auto skip_finished = [&] {
          for (; at < tensors.size() && next == tensors[at].size; ++at) next = 0;
        };
        for (int part = 0; part < parts; ++part) {
          double bytes = 0;
          list.for_each_piece(
              part, parts, edge, [&](std::size_t i, std::int64_t first, std::int64_t end) {
                skip_finished();
                ASSERT_EQ(i, at);
                ASSERT_EQ(first, next);
                ASSERT_LT(first, end);
                const std::int64_t unit =
                    edge == Edge::tile ? tile : TensorList::block_size(tensors[i].size);
                ASSERT_EQ(first % unit, 0);
                ASSERT_TRUE(end % unit == 0 || end == tensors[i].size);
                bytes += static_cast<double>(end - first) * item_size(tensors[i].param_storage());
                next = end;
              });
          if (HasFatalFailure()) FAIL() << parts << " parts";
          if (edge == Edge::block) continue;
          ASSERT_NEAR(bytes, total / parts, 8.0 * tile + 1 + total * 0x1p-50) << part << parts;
        }
        skip_finished();
        ASSERT_EQ(at, tensors.size()) << parts;
      }
    }
  }
}

TEST(TensorList, BlocksAreWholeTilesAndAtMost4096) {
  constexpr std::int64_t most = 4096 * tile;
  const std::pair<std::int64_t, std::int64_t> cases[] = {
      {0, 1}, {1, 1}, {most, 1}, {most + 1, 2}, {2 * most, 2}, {2 * most + 1, 3}};
  EXPECT_EQ(TensorList().blocks(), 0);
  for (const auto& [size, tiles] : cases) EXPECT_EQ(TensorList::block_size(size), tiles * tile);
  EXPECT_EQ(TensorList::block_size(INT64_MAX / 4) % tile, 0);
  EXPECT_LE(INT64_MAX / 4 / TensorList::block_size(INT64_MAX / 4), 4096);
}

}  // namespace
}  // namespace fusedadam
