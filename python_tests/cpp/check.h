// A tiny test runner: TEST(name) { CHECK(condition); }. main.cpp runs all tests of the program, or those named on the
// command line.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <vector>

namespace test {

struct Test {
  const char* name;
  void (*run)();
};

inline std::vector<Test>& all() {
  static std::vector<Test> tests;
  return tests;
}

struct Registered {
  Registered(const char* name, void (*run)()) { all().push_back({name, run}); }
};

}  // namespace test

#define TEST(name)                                                \
  static void test_##name();                                      \
  static const test::Registered kTest_##name(#name, test_##name); \
  static void test_##name()

// Ends the program: what follows may rest on the condition.
#define CHECK(condition)                                                           \
  do {                                                                             \
    if (!(condition)) {                                                            \
      std::fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition); \
      std::exit(1);                                                                \
    }                                                                              \
  } while (false)
