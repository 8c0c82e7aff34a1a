// SPDX-License-Identifier: MIT
//
// See "man 7 cgroups" and "man 5 proc". A path in /proc/self/cgroup starts at the root of the
// hierarchy, but a container mounts only part of it. mountinfo tells which part, and where.
#include "parallel/cpu_quota.hpp"

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <fstream>
#include <functional>
#include <sstream>
#include <system_error>
#include <vector>

#include "fusedadam/threads.hpp"
#include "parallel/float_environment.hpp"

namespace fusedadam {
namespace {

// A hierarchy of control groups, and this process's place in it.
struct Hierarchy {
  bool unified;      // version 2
  std::string path;  // of this process's group
};

struct Mount {
  std::string root;   // path of the mounted group
  std::string point;  // mount point
};

bool has_item(const std::string& list, const std::string& item) {
  return (',' + list + ',').find(',' + item + ',') != std::string::npos;
}

// The kernel escapes spaces, backslashes and the like as \ooo.
std::string unescaped(const std::string& text) {
  std::string plain;
  for (std::size_t i = 0; i < text.size(); ++i) {
    const std::string digits = text.substr(i, 4);
    if (digits.size() == 4 && digits[0] == '\\' &&
        digits.find_first_not_of("01234567", 1) == std::string::npos) {
      plain += static_cast<char>(std::stoi(digits.substr(1), nullptr, 8));
      i += 3;
    } else {
      plain += text[i];
    }
  }
  return plain;
}

// Parses lines "2:cpu,cpuacct:/path" and, for version 2, "0::/path".
std::vector<Hierarchy> hierarchies(const std::string& root) {
  std::vector<Hierarchy> found;
  std::ifstream file(root + "/proc/self/cgroup");
  for (std::string line; std::getline(file, line);) {
    const std::size_t first = line.find(':');
    const std::size_t second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    const bool unified = controllers.empty();
    if (unified || has_item(controllers, "cpu")) {
      found.push_back({unified, line.substr(second + 1)});
    }
  }
  return found;
}

// Parses lines "36 35 98:0 ROOT POINT OPTIONS [FIELD...] - TYPE SOURCE OPTIONS".
std::vector<Mount> mounts_of(const Hierarchy& hierarchy, const std::string& root) {
  std::vector<Mount> found;
  std::ifstream file(root + "/proc/self/mountinfo");
  for (std::string line; std::getline(file, line);) {
    const std::size_t separator = line.find(" - ");
    if (separator == std::string::npos) continue;
    std::istringstream before(line.substr(0, separator));
    std::istringstream after(line.substr(separator + 3));
    std::string skipped;
    Mount mount;
    std::string type;
    std::string options;
    before >> skipped >> skipped >> skipped >> mount.root >> mount.point;
    after >> type >> skipped >> options;
    if (hierarchy.unified ? type == "cgroup2" : type == "cgroup" && has_item(options, "cpu")) {
      found.push_back({unescaped(mount.root), unescaped(mount.point)});
    }
  }
  return found;
}

// Returns the part of a group's path below the mounted group; nullopt if it is not below.
std::optional<std::string> below(const std::string& path, const Mount& mount) {
  const std::string top = mount.root == "/" ? std::string() : mount.root;
  const bool is_below =
      path.starts_with(top) && (path.size() == top.size() || path[top.size()] == '/');
  if (!is_below || path.find("/..") != std::string::npos) return std::nullopt;
  return path.substr(top.size());
}

// Returns the words of a file of fewer than 64 bytes, and none for a longer file.
std::vector<std::string> words_of(const std::string& name) {
  char buffer[64];
  std::ifstream file(name);
  file.read(buffer, sizeof buffer);
  const auto size = static_cast<std::size_t>(file.gcount());
  std::vector<std::string> words;
  if (size == sizeof buffer) return words;
  std::istringstream text(std::string(buffer, size));
  for (std::string word; text >> word;) words.push_back(word);
  return words;
}

std::optional<double> positive(const std::string& word) {
  std::int64_t number = 0;
  const char* const end = word.data() + word.size();
  const auto [stop, error] = std::from_chars(word.data(), end, number);
  if (error != std::errc() || stop != end || number <= 0) return std::nullopt;
  return static_cast<double>(number);
}

std::optional<double> quota_of(const std::string& group, bool unified) {
  std::vector<std::string> words = words_of(group + (unified ? "/cpu.max" : "/cpu.cfs_quota_us"));
  if (!unified) {
    for (std::string& word : words_of(group + "/cpu.cfs_period_us")) words.push_back(word);
  }
  if (words.size() != 2) return std::nullopt;
  const std::optional<double> quota = positive(words[0]);  // "max" or -1: no quota
  const std::optional<double> period = positive(words[1]);
  if (!quota || !period) return std::nullopt;
  return *quota / *period;
}

void keep_smaller(std::optional<double>& quota, std::optional<double> other) {
  if (other && (!quota || *other < *quota)) quota = other;
}

}  // namespace

std::optional<double> cpu_quota(const std::string& root) noexcept {
  // The division may raise the inexact flag, which the caller must not see.
  const DefaultFloatEnvironment environment;
  try {
    std::optional<double> quota;
    for (const Hierarchy& hierarchy : hierarchies(root)) {
      std::vector<Mount> mounts = mounts_of(hierarchy, root);
      // Keep the mounts that contain this process; those of other processes' groups may be among
      // them. If none does, keep all: in such a container the mounted group is the process's own,
      // under another path.
      const auto around = [&](const Mount& mount) {
        return below(hierarchy.path, mount).has_value();
      };
      if (std::ranges::any_of(mounts, around)) std::erase_if(mounts, std::not_fn(around));
      for (const Mount& mount : mounts) {
        std::string group = below(hierarchy.path, mount).value_or("");
        while (true) {
          keep_smaller(quota, quota_of(root + mount.point + group, hierarchy.unified));
          if (group.empty()) break;
          group.resize(group.rfind('/'));
        }
      }
    }
    return quota;
  } catch (const std::exception&) {  // no memory
    return std::nullopt;
  }
}

int asked_threads(const char* omp_num_threads) noexcept {
  if (omp_num_threads == nullptr) return 0;
  // A list has one number per level of nested regions. One invalid entry invalidates the whole
  // list.
  long first = 0;
  for (const char* text = omp_num_threads;; ++text) {
    char* end = nullptr;
    errno = 0;
    const long number = std::strtol(text, &end, 10);
    if (errno != 0 || number <= 0) return 0;
    if (first == 0) first = number;
    text = end + std::strspn(end, " \t\n\v\f\r");
    if (*text == '\0') return static_cast<int>(std::min<std::int64_t>(first, max_threads));
    if (*text != ',') return 0;
  }
}

int most_threads(std::optional<double> quota, int asked) noexcept {
  const double most = quota ? std::ceil(*quota) : static_cast<double>(max_threads);
  return std::max(asked, static_cast<int>(std::clamp(most, 1.0, static_cast<double>(max_threads))));
}

}  // namespace fusedadam
