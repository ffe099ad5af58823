# coverage.awk - a table of the lines that no test ran, from what `gcov -t` prints.
# A header's line counts as run if it ran in any of the files that include it.

/:Source:/ { sub(/.*:Source:/, ""); file = $0; next }
file ~ /^\// || !match($0, /^ *[^ :]+: *[0-9]+:/) { next }
{
	split($0, part, ":")
	count = part[1]
	line = part[2] + 0
	if (count ~ /-/ || line == 0)
		next
	key = file SUBSEP line
	if (!(key in state)) {
		total[file]++
		last[file] = last[file] < line ? line : last[file]
		state[key] = 0
	}
	if (count !~ /[#=]/)
		state[key] = 1
}

function range(from, to) { return from == to ? from : from "-" to }

END {
	printf "%-24s %6s %6s %6s   %s\n", "file", "lines", "missed", "run", "missing"
	sort = "sort"
	for (file in total) {
		missed = from = 0
		text = ""
		for (line = 1; line <= last[file] + 1; line++) {
			key = file SUBSEP line
			if (key in state && !state[key]) {
				missed++
				from = from ? from : line
				to = line
			} else if (from && (key in state || line > last[file])) {
				text = text (text ? ", " : "") range(from, to)
				from = 0
			}
		}
		lines += total[file]
		all_missed += missed
		if (missed)
			printf "%-24s %6d %6d %5d%%   %s\n", file, total[file], missed,
				100 * (total[file] - missed) / total[file], text | sort
	}
	close(sort)
	printf "%-24s %6d %6d %5d%%\n", "all", lines, all_missed, 100 * (lines - all_missed) / lines
}
