// SPDX-License-Identifier: MIT
#include "parallel/cpu_quota.hpp"

#include <gtest/gtest.h>

#include <cfenv>
#include <filesystem>
#include <fstream>
#include <map>
#include <random>

#include "fusedadam/threads.hpp"

namespace fusedadam {
namespace {

// ---- system files ------------------------------------------------------------------------------

using Files = std::map<std::string, std::string>;

// The quota of a system with these files.
std::optional<double> quota_of(const Files& files) {
  const std::filesystem::path root = std::filesystem::temp_directory_path() /
                                     ("fusedadam_quota_" + std::to_string(std::random_device()()));
  for (const auto& [name, text] : files) {
    std::filesystem::create_directories((root / name).parent_path());
    std::ofstream(root / name) << text;
  }
  std::feclearexcept(FE_ALL_EXCEPT);
  const std::optional<double> quota = cpu_quota(root.string());
  EXPECT_EQ(std::fetestexcept(FE_ALL_EXCEPT), 0);  // the caller sees no inexact division
  std::filesystem::remove_all(root);
  return quota;
}

std::string mount_line(const std::string& root, const std::string& point, const std::string& type,
                       const std::string& options) {
  return "31 23 0:28 " + root + ' ' + point + " rw,nosuid shared:9 master:2 - " + type +
         " cgroup rw," + options + '\n';
}

const std::string mount_v2 = mount_line("/", "/sys/fs/cgroup", "cgroup2", "nsdelegate");
std::string mount_v1(const std::string& root = "/") {
  return mount_line(root, "/sys/fs/cgroup/cpu,cpuacct", "cgroup", "cpu,cpuacct");
}
const std::string other_mounts =
    mount_line("/", "/", "ext4", "cpu") +
    mount_line("/", "/sys/fs/cgroup/cpuset", "cgroup", "cpuset") +
    mount_line("/", "/sys/fs/cgroup/systemd", "cgroup", "name=systemd");

// A process in the cgroup v2 `path`, with these files of groups.
Files v2(const std::string& path, const Files& groups, const std::string& mounts = mount_v2) {
  Files files{{"proc/self/cgroup", "0::" + path + '\n'},
              {"proc/self/mountinfo", other_mounts + mounts}};
  for (const auto& [group, text] : groups) files["sys/fs/cgroup" + group + "/cpu.max"] = text;
  return files;
}

// The same of version 1. The text of a group is "QUOTA PERIOD", of two files.
Files v1(const std::string& path, const Files& groups, const std::string& mounts = mount_v1()) {
  Files files{{"proc/self/cgroup",
               "12:cpuset:/elsewhere\n4:cpu,cpuacct:" + path + "\n3:name=systemd:/elsewhere\n"},
              {"proc/self/mountinfo", other_mounts + mounts}};
  for (const auto& [group, text] : groups) {
    const std::string name = "sys/fs/cgroup/cpu,cpuacct" + group + "/cpu.cfs_";
    files[name + "quota_us"] = text.substr(0, text.find(' ')) + '\n';
    files[name + "period_us"] = text.substr(text.find(' ') + 1);
  }
  return files;
}

// ---- quotas ------------------------------------------------------------------------------------

// The least of all groups around a process. A container sees its own cgroup mounted as the root;
// the path is that of the host or its own.
TEST(CpuQuota, IsTheLeastOfTheGroupsAround) {
  const std::string two = "200000 100000";
  const std::string hybrid = mount_v1() + mount_line("/", "/mnt/unified", "cgroup2", "x");
  const auto in_both = [&](const std::string& old_quota, const std::string& new_quota) {
    Files files = v1("/a", {{"/a", old_quota}}, hybrid);
    files["proc/self/cgroup"] += "0::/b\n";
    files["mnt/unified/b/cpu.max"] = new_quota;
    return files;
  };
  // A container beside this process.
  const std::string beside = mount_line("/other", "/mnt/other", "cgroup2", "x");
  Files other_first = v2("/a", {{"/a", "300000 100000"}}, beside + mount_v2);
  Files other_last = v2("/a", {{"/a", "300000 100000"}}, mount_v2 + beside);
  other_first["mnt/other/cpu.max"] = other_last["mnt/other/cpu.max"] = "100000 100000";
  const struct {
    Files files;
    double quota;  // 0: none
  } cases[] = {
      {v2("/", {{"", "200000 100000\n"}}), 2},
      {v2("/a/b", {{"/a/b", "50000 100000\n"}}), 0.5},
      {v2("/a/b", {{"/a/b", "100000 300000\n"}}), 1.0 / 3},
      {v2("/a b:c", {{"/a b:c", "50000 100000\n"}}), 0.5},
      {v2("/a", {{"/a", "max 100000\n"}}), 0},
      {v2("/a/b/c", {{"/a/b/c", "max 100000"}, {"/a", "300000 100000"}}), 3},
      {v2("/a/b/c", {{"/a/b/c", "400000 100000"}, {"/a/b", "300000 100000"}}), 3},
      {v2("/a/b", {{"/a/b", "100000 100000"}, {"", "300000 100000"}}), 1},
      {v2("/a/b", {{"/b", "100000 100000"}, {"/a/bc", "100000 100000"}}), 0},
      {v1("/", {{"", "150000 100000\n"}}), 1.5},
      {v1("/a/b", {{"/a/b", "400000 50000\n"}}), 8},
      {v1("/a", {{"/a", "-1 100000\n"}}), 0},
      {v1("/a/b", {{"/a/b", "-1 100000"}, {"/a", "250000 100000"}}), 2.5},
      {in_both("200000 100000", "300000 100000"), 2},
      {in_both("300000 100000", "200000 100000"), 2},
      {v1("/docker/1f", {{"", two}}, mount_v1("/docker/1f")), 2},
      {v1("/docker/1f", {{"", two}}, mount_v1("/")), 2},
      {v1("/docker/1f", {{"", two}}, mount_v1("/docker/1")), 2},  // no part of the path
      {v1("/../2e", {{"", two}}, mount_v1("/")), 2},              // moved out of the namespace
      {v1("/m.slice/a\\x2db c", {{"", two}}, mount_v1("/m.slice/a\\134x2db\\040c")), 2},
      {v1("/m\\189", {{"", two}}, mount_v1("/m\\189")), 2},  // no escape
      {v1("/docker/1f/in", {{"", two}, {"/in", "100000 100000"}}, mount_v1("/docker/1f")), 1},
      {other_first, 3},
      {other_last, 3},
  };
  for (const auto& c : cases) {
    EXPECT_EQ(quota_of(c.files).value_or(0), c.quota) << c.files.at("proc/self/cgroup");
  }
}

TEST(CpuQuota, IsNoneWhereFilesAreMissingOrMalformed) {
  EXPECT_EQ(quota_of({{"unrelated", ""}}), std::nullopt);
  EXPECT_EQ(cpu_quota("/nowhere/at/all"), std::nullopt);
  EXPECT_EQ(quota_of(v2("/a", {})), std::nullopt);
  const std::string huge(1 << 20, '1');
  for (const std::string text :
       {"", "\n", "100000", "100000 \n", "max", "max max", "-1 100000", "0 100000", "100000 0",
        "100000 -5", "x 100000", "100000 x", "1e5 100000", "100000x 100000", "0x10 100000",
        "99999999999999999999 100000", "100000 100000 100000", "100000,100000", huge.c_str()}) {
    EXPECT_EQ(quota_of(v2("/a", {{"/a", text}})), std::nullopt) << text;
    EXPECT_EQ(quota_of(v2("/a", {{"/a", text}, {"", "200000 100000"}})), 2.0) << text;
    EXPECT_EQ(quota_of(v1("/a", {{"/a", text + " x"}})), std::nullopt) << text;
  }
  EXPECT_EQ(quota_of(v2("/a", {{"/a", "100000 100000" + huge}})), std::nullopt);
  for (const std::string text :
       {"", "0", "0:", ":", "::", "\n\n", "0::a", "0::", "::::", huge.c_str()}) {
    Files files = v2("/", {});
    files["proc/self/cgroup"] = text + '\n';
    EXPECT_EQ(quota_of(files), std::nullopt) << text.substr(0, 9);
    files["proc/self/cgroup"] += "0::/a\n";
    files["sys/fs/cgroup/a/cpu.max"] = "100000 100000";
    EXPECT_EQ(quota_of(files), 1.0) << text.substr(0, 9);
  }
  for (const std::string& text : {std::string(), std::string(" - \n"), std::string("1 2\n"),
                                  std::string("1 2 3 - cgroup2\n"), huge + " - " + huge}) {
    EXPECT_EQ(quota_of(v2("/a", {{"/a", "100000 100000"}}, text)), std::nullopt)
        << text.substr(0, 9);
  }
  // A directory in place of the file can be opened but not read.
  Files files = v2("/a", {});
  files["sys/fs/cgroup/a/cpu.max/x"] = "";
  EXPECT_EQ(quota_of(files), std::nullopt);
  const std::optional<double> own = cpu_quota();
  EXPECT_TRUE(!own || *own > 0);
}

// ---- threads -----------------------------------------------------------------------------------

TEST(AskedThreads, AreThoseOfTheVariableWhereOpenMpTakesIt) {
  EXPECT_EQ(asked_threads(nullptr), 0);
  for (const char* text : {"4", " 4 ", "+4", "4,2", "4 , 2\t", "4,2,1"}) {
    EXPECT_EQ(asked_threads(text), 4) << text;
  }
  for (const char* text : {"", " ", "0", "-4", "four", "4x", "4,", ",4", "4,x", "4,0", "4;2", "4.0",
                           "4 2", "99999999999999999999", "4,99999999999999999999"}) {
    EXPECT_EQ(asked_threads(text), 0) << text;
  }
  EXPECT_EQ(asked_threads("2000000000"), max_threads);
}

TEST(MostThreads, AreTheQuotaRoundedUpOrWhatTheVariableAsksFor) {
  EXPECT_EQ(most_threads(std::nullopt, 0), max_threads);
  EXPECT_EQ(most_threads(std::nullopt, 3), max_threads);
  EXPECT_EQ(most_threads(2.0, 0), 2);
  EXPECT_EQ(most_threads(2.01, 0), 3);
  EXPECT_EQ(most_threads(0.001, 0), 1);
  EXPECT_EQ(most_threads(1e300, 0), max_threads);
  EXPECT_EQ(most_threads(2.0, 8), 8);
  EXPECT_EQ(most_threads(8.0, 2), 8) << "which OpenMP then limits";
}

}  // namespace
}  // namespace fusedadam
