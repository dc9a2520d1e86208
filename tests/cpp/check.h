// Tests that register themselves, and the few words they use.
#pragma once
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

struct Test {
    const char* name;
    void (*body)();
};
std::vector<Test>& all_tests();

#define TEST(name)                                                                                       \
    static void name();                                                                                  \
    [[maybe_unused]] static const bool registered_##name = (all_tests().push_back({#name, name}), true); \
    static void name()

// printf arguments after the condition say which case failed.
#define CHECK(condition, ...)                                                         \
    do {                                                                              \
        if (condition) break;                                                         \
        std::fprintf(stderr, "%s:%d: %s is false: ", __FILE__, __LINE__, #condition); \
        std::fprintf(stderr, __VA_ARGS__), std::fputc('\n', stderr);                  \
        std::exit(1);                                                                 \
    } while (false)
