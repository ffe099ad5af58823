/*
 * crc32c_arm.h - the variant of crc32c.c for the CRC32 extension of Armv8
 */
#include <sys/auxv.h>

#define ARM_HWCAP_CRC32 (1ul << 7) /* Linux, arch/arm64 uapi hwcap.h */

static bool cpu_has_crc32(void)
{
	return (getauxval(AT_HWCAP) & ARM_HWCAP_CRC32) != 0;
}

/*
 * With some compilers arm_acle.h needs -march for the whole file; the builtins do not.
 */
__attribute__((target("+crc"))) static uint32_t crc32c_armv8(uint32_t state, const uint8_t *p,
							     size_t nbytes)
{
	for (; nbytes >= 8; p += 8, nbytes -= 8)
		state = __builtin_aarch64_crc32cx(state, imgc_load_le64(p));
	for (; nbytes != 0; p++, nbytes--)
		state = __builtin_aarch64_crc32cb(state, *p);
	return state;
}
