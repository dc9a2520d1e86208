#include "native/slots.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <stdexcept>

#ifdef __linux__
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#endif

namespace trimtab {

#ifdef __linux__
namespace {

std::string bytes_text(int64_t bytes) { return std::to_string(bytes >> 20) + " MiB"; }

[[noreturn]] void refused(const char* what, int64_t bytes) {
    const int error = errno;
    std::string text = std::string("The system refuses ") + what + " (" + bytes_text(bytes) + "): " + std::strerror(error) + ".";
    if (error == ENOMEM) text += " Where memory is free, the process has too many mappings: raise them with sysctl vm.max_map_count, or take larger pages.";
    throw NoRoom(text);
}

// Address space without memory, in place of what is there, or anywhere: a read or write of it is a fault.
void* reserve(void* at, int64_t bytes) {
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | (at ? MAP_FIXED : 0);
    void* found = mmap(at, static_cast<size_t>(bytes), PROT_NONE, flags, -1, 0);
    if (found == MAP_FAILED) refused("address space", bytes);
    madvise(found, static_cast<size_t>(bytes), MADV_DONTFORK);  // a child process shares no pages of the file
    return found;
}

}  // namespace

SlotMemory::SlotMemory(const SlotForm& form) : form_(form) {
    auto need = [](bool holds, const char* text) {
        if (!holds) throw std::invalid_argument(text);
    };
    need(!form_.token_bytes.empty() && form_.slots >= 1 && form_.tokens >= 1, "Slots need one tensor, one slot and one token or more.");
    for (const int64_t bytes : form_.token_bytes) need(bytes >= 1, "A token has one byte or more.");
    need(form_.page >= 4096 && form_.page % sysconf(_SC_PAGESIZE) == 0, "A page is a multiple of the page of the system.");
    widest_ = *std::max_element(form_.token_bytes.begin(), form_.token_bytes.end());
    pages_ = groups_of(form_.tokens);
    need(form_.pool_groups >= pages_, "The pool is smaller than one sequence of the longest length.");
    ids_ = form_.slots * pages_ + form_.pool_groups;
    need(ids_ < INT32_MAX, "Slots hold fewer than 2^31 groups of pages.");
    file_ = memfd_create("trimtab-kv", MFD_CLOEXEC);
    if (file_ < 0) refused("a file in memory", 0);
    if (ftruncate(file_, tensors() * ids_ * form_.page)) {
        const int error = errno;
        ::close(file_);
        errno = error;
        refused("a sparse file in memory", tensors() * ids_ * form_.page);
    }
    try {
        for (int64_t t = 0; t < tensors(); ++t) bases_.push_back(static_cast<uint8_t*>(reserve(nullptr, form_.slots * pages_ * form_.page)));
    } catch (...) {
        for (uint8_t* at : bases_) munmap(at, static_cast<size_t>(form_.slots * pages_ * form_.page));
        ::close(file_);
        throw;
    }
    counts_.reserved_bytes = tensors() * form_.slots * pages_ * form_.page;
    owners_.assign(static_cast<size_t>(ids_), 0);
    backed_.assign(static_cast<size_t>(ids_), 0);
    slots_.resize(static_cast<size_t>(form_.slots));
    for (Slot& slot : slots_) {
        slot.mapped.assign(static_cast<size_t>(pages_), -1);
        slot.locked.assign(static_cast<size_t>(pages_), 0);
        slot.stale.assign(static_cast<size_t>(pages_), 0);
    }
    if (form_.background) thread_ = std::thread([this] { work(); });
}

SlotMemory::~SlotMemory() {
    if (thread_.joinable()) {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            stop_ = true;
        }
        wake_.notify_all();
        thread_.join();
    }
    for (uint8_t* at : bases_) munmap(at, static_cast<size_t>(form_.slots * pages_ * form_.page));
    ::close(file_);
}

int64_t SlotMemory::groups_of(int64_t tokens) const { return (tokens * widest_ + form_.page - 1) / form_.page; }

SlotMemory::Seq& SlotMemory::seq(int64_t id) {
    if (id < 0 || id >= static_cast<int64_t>(seqs_.size()) || !seqs_[static_cast<size_t>(id)].live)
        throw std::invalid_argument("No such sequence.");
    return seqs_[static_cast<size_t>(id)];
}

int64_t SlotMemory::make() {
    if (unused_.empty()) {
        seqs_.emplace_back();
        unused_.push_back(static_cast<int64_t>(seqs_.size()) - 1);
    }
    const int64_t id = unused_.back();
    unused_.pop_back();
    seqs_[static_cast<size_t>(id)].live = true;
    return id;
}

int64_t SlotMemory::open() {
    std::lock_guard<std::mutex> lock(mutex_);
    return make();
}

int64_t SlotMemory::fork(int64_t from, int64_t tokens) {
    std::lock_guard<std::mutex> lock(mutex_);
    seq(from);
    const int64_t id = make();
    const Seq& old = seqs_[static_cast<size_t>(from)];
    const size_t count = std::min(old.groups.size(), static_cast<size_t>(groups_of(tokens)));
    Seq& s = seqs_[static_cast<size_t>(id)];
    s.groups.assign(old.groups.begin(), old.groups.begin() + static_cast<int64_t>(count));
    for (const int32_t group : s.groups) ++owners_[static_cast<size_t>(group)];
    return id;
}

void SlotMemory::close(int64_t id) {
    std::lock_guard<std::mutex> lock(mutex_);
    Seq& s = seq(id);
    leave(s, 0);
    if (s.slot >= 0) {
        const int64_t at = s.slot;
        slots_[static_cast<size_t>(at)].seq = -1;
        if (!form_.deferred)
            while (reclaim_one(at, 0)) {}
    }
    s = Seq();
    unused_.push_back(id);
}

void SlotMemory::cut(int64_t id, int64_t tokens) {
    std::lock_guard<std::mutex> lock(mutex_);
    leave(seq(id), groups_of(tokens));
}

// Gives up the groups of a sequence from one on. Those nobody else has stay mapped in its slot, if it has one.
void SlotMemory::leave(Seq& s, int64_t from) {
    int64_t first = -1;
    auto flush = [&](int64_t end) {
        if (first >= 0) unmap(s.slot, first, end);
        first = -1;
    };
    const int64_t count = static_cast<int64_t>(s.groups.size());
    for (int64_t i = from; i < count; ++i) {
        const int32_t group = s.groups[static_cast<size_t>(i)];
        Slot* slot = s.slot < 0 ? nullptr : &slots_[static_cast<size_t>(s.slot)];
        const bool here = slot && slot->mapped[static_cast<size_t>(i)] == group;
        if (--owners_[static_cast<size_t>(group)] == 0) {
            --used_;
            if (here) {
                slot->stale[static_cast<size_t>(i)] = 1;
                flush(i);
                continue;
            }
            punch(group);
        }
        if (!here) {
            flush(i);
            continue;
        }
        if (first < 0) first = i;  // another sequence has the page: this slot may not keep it
        slot->mapped[static_cast<size_t>(i)] = -1;
    }
    flush(count);
    s.groups.resize(static_cast<size_t>(std::min(from, count)));
}

// The slot of a sequence that needs `need` groups: of those that are free the one with the fewest mapped that suffices, else the first.
int64_t SlotMemory::take_slot(int64_t id, int64_t need) {
    const bool shares = !seqs_[static_cast<size_t>(id)].groups.empty();
    int64_t best = -1, best_mapped = 0, first = -1;
    for (int64_t i = 0; i < form_.slots; ++i) {
        const Slot& slot = slots_[static_cast<size_t>(i)];
        if (slot.seq >= 0) continue;
        if (first < 0) first = i;
        const int64_t mapped = pages_ - std::count(slot.mapped.begin(), slot.mapped.end(), -1);
        // What is shared is mapped anew, so that a slot with little in it loses least.
        if (shares ? best < 0 || mapped < best_mapped : mapped >= need && (best < 0 || mapped < best_mapped)) best = i, best_mapped = mapped;
    }
    if (best < 0) best = first;
    if (best < 0)
        throw NoRoom("All " + std::to_string(form_.slots) + " slots of the cache are taken. Run fewer sequences at a time, or raise max_batch.");
    slots_[static_cast<size_t>(best)].seq = id;
    seqs_[static_cast<size_t>(id)].slot = best;
    return best;
}

// A group with blocks: `near` if it is free, so that mappings of neighbours become one.
int32_t SlotMemory::take_group(int64_t near) {
    if (committed_ >= form_.pool_groups) reclaim(1);
    if (committed_ >= form_.pool_groups)
        throw NoRoom("The cache has no page left: all " + std::to_string(form_.pool_groups) + " groups (" +
                     bytes_text(form_.pool_groups * tensors() * form_.page) + ") are in use. Run fewer or shorter sequences at a time, or give the cache more.");
    int64_t group = near;
    if (near < 0 || near >= ids_ || backed_[static_cast<size_t>(near)]) {
        // Beyond the slots' own numbers at first, so that they stay free for their slots.
        const int64_t own = form_.slots * pages_, spare = ids_ - own;
        group = -1;
        for (int64_t i = 0; i < ids_ && group < 0; ++i) {
            const int64_t g = i < spare ? own + (cursor_ + i) % spare : i - spare;
            if (!backed_[static_cast<size_t>(g)]) group = g;
        }
        if (group >= own) cursor_ = group - own + 1;
    }
    backed_[static_cast<size_t>(group)] = 1, ++committed_;
    return static_cast<int32_t>(group);
}

// Gives the highest page of a slot back that no sequence needs. False: there is none from `from` on.
bool SlotMemory::reclaim_one(int64_t at, int64_t from) {
    Slot& slot = slots_[static_cast<size_t>(at)];
    const int64_t least = slot.seq < 0 ? 0 : static_cast<int64_t>(seqs_[static_cast<size_t>(slot.seq)].groups.size());
    for (int64_t i = pages_ - 1; i >= std::max(from, least); --i)
        if (slot.mapped[static_cast<size_t>(i)] >= 0) {
            const int32_t group = slot.mapped[static_cast<size_t>(i)];
            slot.mapped[static_cast<size_t>(i)] = -1;
            unmap(at, i, i + 1);
            punch(group);
            return true;
        }
    return false;
}

void SlotMemory::reclaim(int64_t groups) {
    for (int64_t at = form_.slots - 1; at >= 0; --at)
        while (groups > 0 && reclaim_one(at, 0)) --groups;
}

void SlotMemory::punch(int32_t group) {
    for (int64_t t = 0; t < tensors(); ++t) fallocate(file_, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset(t, group), form_.page);
    backed_[static_cast<size_t>(group)] = 0, --committed_;
}

// The mappings of some pages of a slot, neighbours in one call for each tensor.
void SlotMemory::map(int64_t where, std::vector<Change>& changes) {
    Slot& slot = slots_[static_cast<size_t>(where)];
    std::sort(changes.begin(), changes.end(), [](const Change& a, const Change& b) { return a.page < b.page; });
    for (size_t i = 0; i < changes.size();) {
        const Change& one = changes[i];
        size_t end = i + 1;
        while (end < changes.size() && changes[end].page == one.page + static_cast<int64_t>(end - i) && changes[end].locked == one.locked &&
               changes[end].fresh == one.fresh && changes[end].group == one.group + static_cast<int32_t>(end - i))
            ++end;
        const int64_t bytes = static_cast<int64_t>(end - i) * form_.page;
        for (int64_t t = 0; t < tensors(); ++t) {
            if (one.fresh && fallocate(file_, 0, offset(t, one.group), bytes)) refused("memory for the cache", bytes);
            void* to = at(t, where, one.page);
            const int prot = one.locked ? PROT_READ : PROT_READ | PROT_WRITE;
            if (mmap(to, static_cast<size_t>(bytes), prot, MAP_SHARED | MAP_FIXED | MAP_POPULATE, file_, offset(t, one.group)) == MAP_FAILED)
                refused("a mapping of the cache", bytes);
            madvise(to, static_cast<size_t>(bytes), MADV_DONTFORK);
            ++counts_.map_calls;
        }
        for (; i < end; ++i) {
            const size_t page = static_cast<size_t>(changes[i].page);
            slot.mapped[page] = changes[i].group, slot.locked[page] = changes[i].locked, slot.stale[page] = 0;
        }
    }
    changes.clear();
}

void SlotMemory::unmap(int64_t where, int64_t first, int64_t end) {
    for (int64_t t = 0; t < tensors(); ++t) reserve(at(t, where, first), (end - first) * form_.page), ++counts_.unmap_calls;
}

void SlotMemory::grow(Seq& s, int64_t id, int64_t first, int64_t end) {
    if (first < 0 || end < first || end > form_.tokens)
        throw NoRoom("A sequence of " + std::to_string(end) + " tokens does not fit: a slot holds " + std::to_string(form_.tokens) + ". Raise max_len.");
    const int64_t need = groups_of(end);
    if (s.slot < 0) take_slot(id, need);
    Slot& slot = slots_[static_cast<size_t>(s.slot)];
    const int64_t had = static_cast<int64_t>(s.groups.size()), target = form_.whole ? pages_ : need;
    std::vector<Change> changes;
    // What is shared with others, and not mapped here yet.
    for (int64_t i = 0; i < had; ++i) {
        const int32_t group = s.groups[static_cast<size_t>(i)], there = slot.mapped[static_cast<size_t>(i)];
        if (there == group) continue;
        if (there >= 0) slot.mapped[static_cast<size_t>(i)] = -1, punch(there);
        changes.push_back({i, group, owners_[static_cast<size_t>(group)] > 1, false});
    }
    map(s.slot, changes);
    // What is written to, and shared: a copy of its own; what is shared no more: writable again.
    for (int64_t i = first * *std::min_element(form_.token_bytes.begin(), form_.token_bytes.end()) / form_.page; i < std::min(had, need); ++i) {
        const int32_t group = s.groups[static_cast<size_t>(i)];
        if (owners_[static_cast<size_t>(group)] == 1) {
            if (slot.locked[static_cast<size_t>(i)]) changes.push_back({i, group, false, false});
            continue;
        }
        int32_t own = -1;
        try {
            own = take_group(-1);
            for (int64_t t = 0; t < tensors(); ++t)
                if (pwrite(file_, at(t, s.slot, i), static_cast<size_t>(form_.page), offset(t, own)) != form_.page) refused("memory for the cache", form_.page);
        } catch (...) {
            if (own >= 0) punch(own);
            map(s.slot, changes);
            throw;
        }
        --owners_[static_cast<size_t>(group)];
        owners_[static_cast<size_t>(own)] = 1, ++used_, ++counts_.copied_groups;
        s.groups[static_cast<size_t>(i)] = own;
        changes.push_back({i, own, false, false});
    }
    map(s.slot, changes);
    // New ones: those that lie there already, then fresh ones.
    for (int64_t i = had; i < target; ++i) {
        int32_t group = slot.mapped[static_cast<size_t>(i)];
        if (group >= 0) {
            if (slot.locked[static_cast<size_t>(i)]) {
                std::vector<Change> again{{i, group, false, false}};
                const uint8_t stale = slot.stale[static_cast<size_t>(i)];
                map(s.slot, again);
                slot.stale[static_cast<size_t>(i)] = stale;
            }
            if (form_.secure && slot.stale[static_cast<size_t>(i)])
                for (int64_t t = 0; t < tensors(); ++t) std::memset(at(t, s.slot, i), 0, static_cast<size_t>(form_.page));
            slot.stale[static_cast<size_t>(i)] = 0;
        } else {
            const int64_t before = i ? s.groups[static_cast<size_t>(i - 1)] : -1, home = s.slot * pages_ + i;
            try {
                group = take_group(before >= 0 && before + 1 < ids_ && !backed_[static_cast<size_t>(before + 1)] ? before + 1 : home);
            } catch (...) {
                map(s.slot, changes);
                throw;
            }
            changes.push_back({i, group, false, true});
        }
        owners_[static_cast<size_t>(group)] = 1, ++used_;
        s.groups.push_back(group);
    }
    map(s.slot, changes);
}

// Tokens from `first` on that lie in pages this sequence alone has.
int64_t SlotMemory::room(const Seq& s, int64_t first) const {
    const Slot& slot = slots_[static_cast<size_t>(s.slot)];
    int64_t page = first * widest_ / form_.page;
    const int64_t count = static_cast<int64_t>(s.groups.size());
    while (page < count && owners_[static_cast<size_t>(s.groups[static_cast<size_t>(page)])] == 1 && !slot.locked[static_cast<size_t>(page)]) ++page;
    return std::min(page * form_.page / widest_, form_.tokens) - first;
}

void SlotMemory::step(const int64_t* ids, const int64_t* first, const int64_t* end, int64_t count, int64_t* found) {
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [&] { return !asked_; });
    for (int64_t i = 0; i < count; ++i) {
        Seq& s = seq(ids[i]);
        grow(s, ids[i], first[i], end[i]);
        found[2 * i] = s.slot, found[2 * i + 1] = room(s, first[i]);
    }
    if (!form_.background || form_.whole) return;
    coming_.clear();
    for (int64_t i = 0; i < count; ++i) coming_.emplace_back(ids[i], end[i]);
    asked_ = true;
    lock.unlock();
    wake_.notify_one();
}

void SlotMemory::settle() {
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [&] { return !asked_; });
}

// Maps what the next steps need, without taking from others; if that is nothing, gives back one group of a slot without a sequence,
// not of the first such slot, which the next sequence gets.
void SlotMemory::ahead() {
    int64_t left = form_.eager_groups;
    bool needed = false;
    for (const auto& [id, end] : coming_) {
        if (!seqs_[static_cast<size_t>(id)].live || seqs_[static_cast<size_t>(id)].slot < 0) continue;
        const Seq& s = seqs_[static_cast<size_t>(id)];
        Slot& slot = slots_[static_cast<size_t>(s.slot)];
        const int64_t need = std::min(groups_of(std::min(end + form_.eager_steps, form_.tokens)), pages_);
        std::vector<Change> changes;
        for (int64_t i = static_cast<int64_t>(s.groups.size()); i < need; ++i) {
            if (slot.mapped[static_cast<size_t>(i)] >= 0) continue;
            needed = true;
            if (left == 0 || committed_ >= form_.pool_groups) break;
            const int64_t before = i ? slot.mapped[static_cast<size_t>(i - 1)] : -1;
            const bool next = before >= 0 && before + 1 < ids_ && !backed_[static_cast<size_t>(before + 1)];
            changes.push_back({i, take_group(next ? before + 1 : s.slot * pages_ + i), false, true});
            --left;
            break;  // one group a sequence is enough
        }
        map(s.slot, changes);
    }
    if (needed) return;
    bool first = true;
    int64_t last = -1;
    for (int64_t i = 0; i < form_.slots; ++i) {
        if (slots_[static_cast<size_t>(i)].seq >= 0) continue;
        if (!first && std::any_of(slots_[static_cast<size_t>(i)].mapped.begin(), slots_[static_cast<size_t>(i)].mapped.end(), [](int32_t g) { return g >= 0; })) last = i;
        first = false;
    }
    if (last >= 0) reclaim_one(last, 0);
}

void SlotMemory::work() {
    std::unique_lock<std::mutex> lock(mutex_);
    while (true) {
        wake_.wait(lock, [&] { return asked_ || stop_; });
        if (stop_) return;
        try {
            ahead();
        } catch (const std::bad_alloc&) {  // whoever needs the page says so
        }
        asked_ = false;
        done_.notify_all();
    }
}

SlotCounts SlotMemory::counts() {
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [&] { return !asked_; });
    SlotCounts found = counts_;
    found.used_groups = used_, found.kept_groups = committed_ - used_;
    int64_t mappings = 0, before = -2;  // group and protection of the page before, neighbours in the file one mapping
    uint8_t locked = 0;
    for (const Slot& slot : slots_)
        for (int64_t i = 0; i < pages_; ++i) {
            const int64_t group = slot.mapped[static_cast<size_t>(i)];
            const bool joined = group < 0 ? before == -1 : before >= 0 && before + 1 == group && locked == slot.locked[static_cast<size_t>(i)];
            mappings += !joined, before = group, locked = slot.locked[static_cast<size_t>(i)];
        }
    found.mappings = mappings * tensors();
    struct stat status;
    if (fstat(file_, &status) == 0) found.file_bytes = static_cast<int64_t>(status.st_blocks) * 512;
    return found;
}

#else  // other systems have no such file: runtime/cache/slots.py falls back to pages

SlotMemory::SlotMemory(const SlotForm& form) : form_(form) { throw NoRoom("Slots need Linux."); }
SlotMemory::~SlotMemory() = default;
int64_t SlotMemory::groups_of(int64_t tokens) const { return tokens; }
int64_t SlotMemory::open() { return 0; }
int64_t SlotMemory::fork(int64_t, int64_t) { return 0; }
void SlotMemory::close(int64_t) {}
void SlotMemory::cut(int64_t, int64_t) {}
void SlotMemory::step(const int64_t*, const int64_t*, const int64_t*, int64_t, int64_t*) {}
void SlotMemory::settle() {}
SlotCounts SlotMemory::counts() { return counts_; }

#endif

}  // namespace trimtab
